#!/usr/bin/env bash
# Tunes a language model to follow instructions, with two operators on this machine.
#
#   examples/instructions/run.sh DATA MODEL [SCRATCH] [--set KEY=VALUE ...]
#
# DATA     A folder with train.jsonl and test.jsonl, {"instruction": ..., "context": ..., "response": ...} on
#          each line; the context may be empty. The figures are for Databricks Dolly 15k, CC BY-SA 3.0.
# MODEL    A checkpoint folder of a language model, or its name on the Hugging Face hub.
# SCRATCH  A folder to work in; a new temporary one unless given.
# --set    Changes the recipe. A first try: --set data.train_examples=16 --set data.validation_examples=16
#
# Expect, for a 6.5M-parameter Llama: perplexity 263 before and about 216 after on the test responses; 5.1 GB up
# and 11.5 GB down in all, some minutes on 2 cores that the workers share.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath -- "${1:?name the folder with train.jsonl and test.jsonl}")
model=${2:?name the model: a folder, or a name on the hub}
shift 2
scratch=
if [[ ${1:--} != -* ]]; then
    scratch=$1
    shift
fi
if [[ -d $model ]]; then
    model=$(realpath -- "$model")
fi

. "$here/../common.sh"
enter_scratch "$scratch"
ln -sfn "$data" data
if [[ -d $model ]]; then
    ln -sfn "$model" model
    model=model
fi
sed "s|name: model .*|name: $model|" "$here/recipe.yaml" >recipe.yaml
start_workers "$model" 2

train_recipe "$@"
blindtune eval output --operators recipe.yaml
blindtune generate output --operators recipe.yaml --max-new-tokens 64 --prompt "Name three things to pack for a day in the mountains."
