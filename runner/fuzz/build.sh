#!/bin/sh
# Build the fuzzer with sanitizers: build.sh OUTPUT. Needs clang and the runner's libraries.
set -e
here=$(cd "$(dirname "$0")" && pwd)
clang=$(command -v clang++ || ls /usr/bin/clang++-[0-9]* | tail -1)
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
version() { sed -n "s/.*set($1 \"\([^\"]*\)\".*/\1/p" "$here/../CMakeLists.txt"; }
cat > "$objects/flags" <<FLAGS
-std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
-DAMX_TVM_VERSION="\"$(version AMX_TVM_VERSION)\""
-DAMX_FFI_VERSION="\"$(version AMX_FFI_VERSION)\""
FLAGS
parts="tokenizer manifest bpe json_file text generate cpu budget byte_level digest mapped"
for name in ../fuzz/fuzz $(for part in $parts; do echo "../src/$part"; done); do
  echo "$here/$name.cpp $objects/$(basename "$name").o"
done | xargs -P 2 -n 2 sh -c \
  'exec "$0" "@$1/flags" -fsanitize=fuzzer-no-link -c "$2" -o "$3"' "$clang" "$objects"
"$clang" "@$objects/flags" -fsanitize=fuzzer "$objects"/*.o -lpcre2-8 -lutf8proc -o "$1"
