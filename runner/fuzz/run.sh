#!/bin/sh
# Build the fuzzer and run it for some seconds: run.sh SECONDS. Says so where clang is missing.
set -e
here=$(cd "$(dirname "$0")" && pwd)
if ! command -v clang++ >/dev/null && ! ls /usr/bin/clang++-[0-9]* >/dev/null 2>&1; then
  echo "clang++ is not installed; the runner is not fuzzed (Debian: apt-get install clang)"
  exit 0
fi
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
if ! sh "$here/build.sh" "$place/amx-fuzz" 2>"$place/errors"; then
  if grep -q "fatal error.*not found\|cannot find" "$place/errors"; then
    echo "the runner is not fuzzed; it needs (Debian) libclang-rt-dev libpcre2-dev \\
libutf8proc-dev nlohmann-json3-dev"
    exit 0
  fi
  cat "$place/errors" >&2
  exit 1
fi
mkdir "$place/corpus"
for seed in "$here"/seeds/*; do cp "$seed" "$place/corpus"; done
cd "$place"
"$place/amx-fuzz" -seed="${AMX_FUZZ_SEED:-1}" -max_total_time="$1" -rss_limit_mb=1024 -malloc_limit_mb=1024 -timeout=10 \
  -max_len=16384 -print_final_stats=1 "$place/corpus" >"$place/log" 2>&1 || status=$?
if [ "${status:-0}" -ne 0 ]; then
  tail -60 "$place/log"
  for file in "$place"/crash-* "$place"/timeout-* "$place"/oom-*; do
    [ -f "$file" ] && base64 "$file"
  done
  exit 1
fi
grep "number_of_executed_units\|peak_rss_mb" "$place/log" | sed 's/^stat::/runner: /'
