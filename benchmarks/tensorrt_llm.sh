#!/usr/bin/env bash
# Runs bundles on TensorRT-LLM, on a machine that has it and a GPU, and says of each thing whether it works.
#
#   benchmarks/tensorrt_llm.sh [LLAVA_CHECKPOINT [KEEP]]        default: engines/micro-llava and 0.44
#
# Prints `PASS what`, `FAIL what: why` or `SKIP what: why` line by line, then a table of latencies. Exit code: 1 if
# anything failed. Environment:
#   VTEXPORT        the vtexport command (default: vtexport); it may be in another virtual environment
#   TRTLLM_PYTHON   the Python that has tensorrt_llm, and vtexport without its dependencies (default: python3)
#   PORT            the first of five ports for the servers, which run one after the other (default: 8000)
#   BUNDLES         a folder to keep bundles in, and to take them from if they are there (default: none are kept)
#   QUESTIONS       how many are asked of each server (default: 24 held-out ones of micro-llava, 8 of others)
#   ROUNDS          of eight timed requests (default: 3; 0 for no latency)
#   START_SECONDS   how long a server may take to start (default: 900)
set -uo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
checkpoint="${1:-$root/engines/micro-llava}"
keep="${2:-0.44}"
trtllm_python="${TRTLLM_PYTHON:-python3}"
port="${PORT:-8000}"
start_seconds="${START_SECONDS:-900}"
rounds="${ROUNDS:-3}"
client="$root/benchmarks/tensorrt_llm_client.py"

stop_early() {
  echo "error: $*" >&2
  exit 2
}

[ $# -le 2 ] || stop_early "too many arguments; usage: benchmarks/tensorrt_llm.sh [LLAVA_CHECKPOINT [KEEP]]"
[ -f "$checkpoint/config.json" ] || stop_early "$checkpoint is no checkpoint; give a folder with config.json"
vtexport="$(command -v "${VTEXPORT:-vtexport}")" || stop_early "no command vtexport; install it, or set VTEXPORT"
trtllm_python="$(command -v "$trtllm_python")" || stop_early "no $trtllm_python; set TRTLLM_PYTHON"
checkpoint="$(cd "$checkpoint" && pwd)"
# The Python of the vtexport command: what its first line names, or the one beside it.
python="$(sed -n '1s/^#! *\(.*python[0-9.]*\)$/\1/p' "$vtexport")"
"${python:-false}" -c "import vtexport" 2> /dev/null || python="$(dirname "$vtexport")/python3"
"$python" -c "import vtexport" 2> /dev/null || stop_early "$vtexport has no Python beside it; give the one of its environment"

logs="$(mktemp -d "${TMPDIR:-/tmp}/vtexport-tensorrt-llm-XXXXXX")"
work="$(mktemp -d)"
# What servers leave in the folder for temporary files goes with the rest.
export TMPDIR="$work"
bundles="${BUNDLES:-$work/bundles}"
server=""

# Ends the server with all of its processes.
stop() {
  [ -n "$server" ] || return 0
  kill -TERM -- "-$server" 2> /dev/null
  for _ in $(seq 150); do
    kill -0 -- "-$server" 2> /dev/null || break
    sleep 0.2
  done
  kill -KILL -- "-$server" 2> /dev/null
  wait "$server" 2> /dev/null
  server=""
}
trap 'stop; rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

: > "$logs/results.txt"
say() { echo "$*" | tee -a "$logs/results.txt"; }

# A command of the client, whose lines are results; NAME says what failed if it stops.
client() {
  local name="$1"
  shift
  if ! "$python" "$client" "$@" 2> "$logs/client.log" | tee -a "$logs/results.txt"; then
    cp "$logs/client.log" "$logs/client-$name.log"
    say "FAIL $name: the client stopped ($(tail -n 1 "$logs/client.log")); see $logs/client-$name.log"
    return 1
  fi
}

# Builds bundle NAME by METHOD and KEEP for TARGET.
build() {
  if [ ! -d "$bundles/$1" ] && ! "$vtexport" build --model "$checkpoint" --method "$2" --keep "$3" --target "$4" \
    --dtype "$dtype" --out "$bundles/$1" > "$logs/build-$1.log" 2>&1; then
    say "FAIL build $1: $(tail -n 1 "$logs/build-$1.log"); see $logs/build-$1.log"
    return 1
  fi
  say "PASS build $1 ($2, keep $3, $4, $dtype)"
}

# Starts bundle $1 as server NAME $2 with more options of trtllm-serve; it may not be ready yet.
launch() {
  local bundle="$1"
  name="$2"
  shift 2
  port=$((port + 1))
  url="http://127.0.0.1:$((port - 1))"
  log="$logs/serve-$name.log"
  report="$logs/report-$name.jsonl"
  # The folder of Python first: serve.sh calls python3 and trtllm-serve.
  VTEXPORT_REPORT="$report" PATH="$work/bin:$(dirname "$trtllm_python"):$PATH" \
    setsid "$bundles/$bundle/serve.sh" "$served" --host 127.0.0.1 --port "$((port - 1))" "$@" > "$log" 2>&1 &
  server=$!
}

# Starts bundle NAME and waits until it is ready.
serve() {
  if [ ! -d "$bundles/$1" ]; then
    say "SKIP serve $1: it was not built"
    return 1
  fi
  launch "$1" "$1"
  "$python" "$client" wait "$url" "$server" "$start_seconds"
  case $? in
    0) say "PASS serve $1" ;;
    4) say "FAIL serve $1: the server ended; see $log" ;;
    5) say "FAIL serve $1: it was not ready after $start_seconds seconds; see $log" ;;
    *) say "FAIL serve $1: the client stopped; see $log" ;;
  esac
  if ! tail -n 1 "$logs/results.txt" | grep -q ^PASS; then
    stop
    return 1
  fi
}

# Times the server, which is bundle NAME.
timed() {
  [ "$rounds" = 0 ] \
    || client "latency-$1" latency "$url" --json "$logs/latency-$1.json" --first "$2" --rounds "$rounds"
}

# Starts bundle NAME with blocks reused, which it has to refuse.
refuses_reuse() {
  local what="$1 refuses enable_block_reuse" message="enable_block_reuse cannot go with"
  if [ ! -d "$bundles/$1" ]; then
    say "SKIP $what: it was not built"
    return
  fi
  printf 'kv_cache_config:\n  enable_block_reuse: true\n' > "$work/reuse.yaml"
  launch "$1" "$1-reuse" --extra_llm_api_options "$work/reuse.yaml"
  "$python" "$client" wait "$url" "$server" "$start_seconds" --message "$message" --log "$log"
  local code=$?
  stop
  if [ "$code" = 0 ]; then
    say "FAIL $what: it started; see $log"
  elif grep -q "$message" "$log"; then
    say "PASS $what"
  else
    say "FAIL $what: another message stands in $log"
  fi
}

echo "logs: $logs"

# --- what is here -------------------------------------------------------------------------------------------------

versions="$("$trtllm_python" -c "
import importlib.metadata as metadata
import tensorrt_llm
names = ('torch', 'transformers', 'vtexport')
print(', '.join(['tensorrt_llm ' + tensorrt_llm.__version__, *(f'{name} {metadata.version(name)}' for name in names)]))
" 2> "$logs/versions.log" | tail -n 1)"
if [ -z "$versions" ]; then
  say "FAIL versions: $(tail -n 1 "$logs/versions.log"); TRTLLM_PYTHON needs tensorrt_llm, and vtexport (pip install" \
    "msgspec && pip install --no-deps vtexport)"
  exit 1
fi
say "PASS versions ($versions)"
if command -v nvidia-smi > /dev/null && gpu="$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader)"; then
  say "PASS GPU ($(echo "$gpu" | head -n 1))"
else
  say "SKIP GPU: nvidia-smi is not there, or finds none"
fi
differing="$("$trtllm_python" -c "
from vtexport.targets.tensorrt_llm.torch_model.contract import differing
print('vtexport:', '; '.join(differing()))
" 2> "$logs/contract.log" | grep '^vtexport:')"
if [ "$differing" = "vtexport: " ]; then
  say "PASS contract"
else
  say "FAIL contract: ${differing:-$(tail -n 1 "$logs/contract.log")}"
fi

# --- bundles ------------------------------------------------------------------------------------------------------

bytes="$(find -L "$checkpoint" -maxdepth 1 -name '*.safetensors' -printf '%s\n' | awk '{ sum += $1 } END { printf "%.0f", sum }')"
dtype=fp32 small=true
[ "$bytes" -le 2000000000 ] || dtype=fp16 small=false
mkdir -p "$bundles" "$work/bin"
printf '#!/bin/sh\nexec "%s" "$@"\n' "$trtllm_python" > "$work/bin/python3"
chmod +x "$work/bin/python3"
build pruned sparsevlm "$keep" tensorrt-llm
build fastervlm fastervlm "$keep" tensorrt-llm
build dense dense 1 tensorrt-llm
against_pruned=() against_fastervlm=()
if $small; then
  build pruned-onnxruntime sparsevlm "$keep" onnxruntime && against_pruned=(--against "$bundles/pruned-onnxruntime")
  build fastervlm-onnxruntime fastervlm "$keep" onnxruntime \
    && against_fastervlm=(--against "$bundles/fastervlm-onnxruntime")
else
  say "SKIP build onnxruntime: the checkpoint has $((bytes / 1000000)) MB of weights, too many for fp32 on a CPU"
fi
questions=(--questions "${QUESTIONS:-8}")
[ "$(basename "$checkpoint")" != micro-llava ] || questions=(--questions "${QUESTIONS:-24}" --held-out)

served="$checkpoint"
case "$versions" in
  *"transformers 4."*) served="$("$python" "$client" older "$checkpoint" "$work/checkpoint")" ;;
esac

# --- servers, one after the other ---------------------------------------------------------------------------------

if serve pruned; then
  client pruned check "$bundles/pruned" "$url" --name pruned --report "$report" "${questions[@]}" "${against_pruned[@]}"
  timed pruned 0
  stop
fi
if serve fastervlm; then
  common=("$bundles/fastervlm" "$url" --report "$report" "${questions[@]}" "${against_fastervlm[@]}")
  client fastervlm check "${common[@]}" --name "fastervlm, images"
  client embeddings check "${common[@]}" --name "fastervlm, embeddings" --embeddings
  stop
fi
refuses_reuse pruned
refuses_reuse fastervlm
if [ "$rounds" != 0 ] && serve dense; then
  timed dense 1000
  stop
fi

if [ "$rounds" = 0 ]; then
  say "SKIP latency: ROUNDS is 0"
elif [ -f "$logs/latency-dense.json" ] && [ -f "$logs/latency-pruned.json" ]; then
  say "PASS latency"
  client table table "$logs/latency-dense.json" "$logs/latency-pruned.json"
else
  say "SKIP latency: it takes a dense and a pruned server"
fi
! grep -q ^FAIL "$logs/results.txt"
