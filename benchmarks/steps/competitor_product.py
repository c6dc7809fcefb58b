"""The encrypted products of `competitor`, in an environment with concrete-ml-extensions alone.

It is asked over its input, a line of JSON with ``features`` and ``rows``, and answers each with a line of
figures: what the client did (encrypt, decrypt) and what the server did, in seconds and core-seconds.
"""

import json
import sys
import time

import concrete_ml_extensions as fhe
import numpy as np

# Its values are unsigned; negative ones wrap, as in two's complement.
LARGEST = 127


class Parts:
    """Adds up seconds and core-seconds."""

    def __init__(self):
        self.seconds = {"client": 0.0, "server": 0.0}
        self.core_seconds = {"client": 0.0, "server": 0.0}

    def time(self, part, function):
        """Calls a function."""
        started, used = time.perf_counter(), time.process_time()
        result = function()
        self.seconds[part] += time.perf_counter() - started
        self.core_seconds[part] += time.process_time() - used
        return result


def product(parameters, private_key, compression_key, features, rows):
    """One product of random rows with a random square matrix."""
    generator = np.random.default_rng(0)
    x = generator.integers(-LARGEST, LARGEST + 1, (rows, features))
    matrix = generator.integers(-LARGEST, LARGEST + 1, (features, features))
    parts = Parts()
    encrypted = parts.time("client", lambda: fhe.encrypt_matrix(private_key, parameters, x.astype(np.uint64)))
    answer = parts.time(
        "server", lambda: fhe.matrix_multiplication(encrypted, matrix.astype(np.uint64), compression_key)
    )
    # The server packs as many results into one ciphertext as its polynomials have coefficients.
    packed = json.loads(fhe.default_params())["packing_ks_polynomial_size"]
    last = (features - 1) % packed + 1
    result = parts.time("client", lambda: fhe.decrypt_matrix(answer, private_key, parameters, last))
    expected = (x @ matrix).astype(float)
    error = np.asarray(result).astype(np.int64) - expected
    return {
        "seconds": parts.seconds,
        "core_seconds": parts.core_seconds,
        "bytes_up": len(encrypted.serialize()),
        "bytes_down": len(answer.serialize()),
        "relative_error": float(np.linalg.norm(error) / np.linalg.norm(expected)),
    }


def main():
    """Answers until the input closes."""
    parameters = fhe.MatmulCryptoParameters.deserialize(fhe.default_params())
    private_key, compression_key = fhe.create_private_key(parameters)
    print(json.dumps({"key_bytes": len(compression_key.serialize())}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        figures = product(parameters, private_key, compression_key, asked["features"], asked["rows"])
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
