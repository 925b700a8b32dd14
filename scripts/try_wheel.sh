#!/usr/bin/env bash
# Does the wheel do for somebody who has nothing else? Builds it, installs it into a fresh environment with the versions of
# requirements.lock, and runs in an empty folder what a newcomer runs first, each once.
#     scripts/try_wheel.sh [NEW_FOLDER]     keeps the environment and the runs there; without, they are deleted
# PYTHON is the interpreter [python3.11], PIP_FLAGS are more options of pip.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -gt 0 ]; then
    mkdir "$1" && folder=$(cd "$1" && pwd)
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
unset PYTHONPATH VIRTUAL_ENV

run() {
    local start=$SECONDS
    printf '\n$ %s\n' "$*"
    "$@"
    printf -- '-- %d s\n' $((SECONDS - start))
}

"${PYTHON:-python3.11}" -m venv "$folder/venv"
PATH=$folder/venv/bin:$PATH
# shellcheck disable=SC2086  # PIP_FLAGS are words
run pip wheel --quiet ${PIP_FLAGS:-} --no-deps --wheel-dir "$folder" "$root"
wheel=$(echo "$folder"/gopo_lightning-*.whl)
# shellcheck disable=SC2086
run pip install --quiet ${PIP_FLAGS:-} --constraint "$root/requirements.lock" "$wheel[quickstart]"
run pip check

mkdir "$folder/empty" && cd "$folder/empty"
run gopo-lightning config list
run gopo-lightning quickstart --smoke

cat >my_rewards.py <<'END'
def few_words(prompts, completions):
    return [None if not text.strip() else -len(text.split()) for text in completions]
END
cat >my.yaml <<'END'
model:
  init_args:
    rewards:
      combine: weighted_sum
      sources:
        - class_path: gopo_lightning.rewards.FunctionReward
          init_args: {function: my_rewards.few_words}
trainer:
  precision: 32-true  # fast enough on every CPU; some emulate bfloat16
  logger: {class_path: TensorBoardLogger, init_args: {save_dir: runs, name: mine, version: first}}
END
mine=(--config quickstart/gopo --config my.yaml --config debug/smoke)
run gopo-lightning fit "${mine[@]}"
run gopo-lightning inspect "${mine[@]}" --num_prompts 2
run gopo-lightning export runs/mine/first exported
test -s exported/model.safetensors
test -s runs/inspect/inspect.json
printf '\nthe wheel works: %s\n' "$(basename "$wheel")"
