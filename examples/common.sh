# What the examples share. Source it, then:
#
#   enter_scratch FOLDER           go to a scratch folder; an empty name makes a new one
#   start_workers MODEL OPERATORS  certificates in ./certs, then a worker for each of 1 or 2 operators
#   train_recipe [--set ...]       look at recipe.yaml, check it, and train
#
# The workers listen on 127.0.0.2:7101 (alpha) and 127.0.0.3:7102 (beta), write to ./workers, and are stopped
# when the script that sourced this file ends. Both run on this machine, so nothing is private here.

# Without an activated environment, that of the repository is taken.
PATH="$PATH:$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"

enter_scratch() {
    local folder=${1:-$(mktemp -d)}
    mkdir -p "$folder"
    cd "$folder"
    echo "working in $PWD"
}

start_workers() {
    local model=$1 operators=$2 name address
    local names=(alpha beta) addresses=(127.0.0.2:7101 127.0.0.3:7102)
    workers=()
    trap stop_workers EXIT
    mkdir -p workers
    for ((i = 0; i < operators; i++)); do
        name=${names[i]} address=${addresses[i]}
        if [[ ! -d certs/$name ]]; then
            blindtune certs certs --operator "$name" --host "${address%:*}"
        fi
        # In a session of its own, so that Ctrl-C reaches the training alone, which then saves a checkpoint.
        setsid blindtune-worker serve --model "$model" --listen "$address" --log-format text \
            --tls-cert "certs/$name/worker.pem" --tls-key "certs/$name/worker-key.pem" \
            --tls-client-ca "certs/$name/ca.pem" >"workers/$name.json" 2>"workers/$name.log" &
        workers+=($!)
    done
    for ((i = 0; i < operators; i++)); do
        # A worker that listens says so in one line of JSON.
        until grep -q '"listening"' "workers/${names[i]}.json"; do
            if ! kill -0 "${workers[i]}" 2>/dev/null; then
                echo "the worker of ${names[i]} did not start:" >&2
                tail -n 5 "workers/${names[i]}.log" >&2
                exit 1
            fi
            sleep 0.5
        done
        echo "the worker of ${names[i]} listens on ${addresses[i]}"
    done
}

stop_workers() {
    kill "${workers[@]}" 2>/dev/null || true
    wait "${workers[@]}" 2>/dev/null || true
}

train_recipe() {
    blindtune train recipe.yaml --dry-run "$@" # shows examples, steps and traffic; connects to nothing
    blindtune check recipe.yaml "$@"           # ends here if it finds a problem
    local go_on=()
    if [[ -f output/run.json ]]; then # the same command again goes on with a run that was stopped
        go_on=(--resume)
    fi
    blindtune train recipe.yaml "${go_on[@]}" "$@"
}
