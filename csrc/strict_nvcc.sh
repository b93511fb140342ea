#!/bin/sh
# Run a compiler, and fail where ptxas says that it serializes matrix products: each then waits for the one before, at a
# multiple of the time. To ptxas that is information (C7510 and its neighbours), which -Werror does not reach.
#
#   strict_nvcc.sh nvcc ...
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" >"$log" 2>&1
status=$?
cat "$log" >&2
if [ "$status" -eq 0 ] && grep -q '(C75[0-9][0-9]).*serialized' "$log"; then
  echo "error: matrix products are serialized (above); give the kernel registers, or wait for products before their results are read" >&2
  exit 1
fi
exit "$status"
