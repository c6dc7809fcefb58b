#!/usr/bin/env bash
# Tunes a language model to reason in steps before it answers, with two operators on this machine.
#
#   examples/chain_of_thought/run.sh DATA MODEL [SCRATCH] [--set KEY=VALUE ...]
#
# DATA     A folder with train.jsonl and test.jsonl, {"question": ..., "rationale": ..., "answer": ...} on
#          each line. The figures are for GSM8K, grade-school-math by OpenAI, MIT: what precedes #### in its
#          answers is the rationale, and what follows it the answer.
# MODEL    A checkpoint folder of a language model, or its name on the Hugging Face hub.
# SCRATCH  A folder to work in; a new temporary one unless given.
# --set    Changes the recipe. A first try: --set data.train_examples=16 --set data.validation_examples=16
#
# Expect, for a 6.5M-parameter Llama: perplexity 606 before and about 113 after on 100 test problems (exact match
# 0: such a model cannot calculate); 7.3 GB up and 16.3 GB down in all, some minutes on 2 cores.
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
blindtune eval output --operators recipe.yaml --exact-match 10 --max-new-tokens 128
blindtune generate output --operators recipe.yaml --max-new-tokens 128 \
    --prompt "A pen costs 3 dollars and a book costs 5 dollars. How much do two pens and a book cost?"
