#!/usr/bin/env bash
# Everything that needs a GPU, with programs that were built elsewhere: tests/gpu.sh DIRECTORY [check] [speed] [memory] [sanitize]
#
# DIRECTORY holds `unit` and `suite` (the test programs of `cargo test --no-run`), `tunebook-bench`, and libstd-*.so of the toolchain
# (`rustc --print target-libdir`). Neither Rust nor a CUDA toolkit is needed here; compute-sanitizer is, to sanitize. The test programs
# look for tests/golden where they were built: link this repository there. Without words after the directory: check, speed and memory.
set -euo pipefail
dir=$(realpath "${1:?directory of the programs}")
shift
[ $# -gt 0 ] || set -- check speed memory
export LD_LIBRARY_PATH=$dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
qlora=(train-step --random-weights --device cuda --r 64 --optimizer adamw_8bit)
small=(train-step --random-weights --device cuda --r 16 --batch 1 --seq 512)
host=(--host-embeddings --host-checkpoints)

check() {
    "$dir/unit" engine::cuda
    "$dir/suite" cuda
}

# One JSON line each on stdout, a summary on stderr.
speed() {
    local shape
    for shape in "4 512" "1 2048" "4 2048" "1 8192"; do
        read -r batch seq <<<"$shape"
        "$dir/tunebook-bench" "${qlora[@]}" --batch "$batch" --seq "$seq" --keep-dequantized
        # What can be is on the host; what that gives back is enough for the decoded weights of one layer.
        "$dir/tunebook-bench" "${qlora[@]}" --batch "$batch" --seq "$seq" "${host[@]}" --keep-dequantized
    done
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 512 "${host[@]}"
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 512 --dropout 0.1 --keep-dequantized
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 512 --dropout 0.1 "${host[@]}"
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 512 --checkpointing none
    # With room to spare, as on a card of 24 GB: no weight is decoded in a step.
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 512 --dequantized-layers 32 --vram-cap 24GiB
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 512 --dropout 0.1 --dequantized-layers 32
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 512 --checkpointing none --dequantized-layers 32
    "$dir/tunebook-bench" "${qlora[@]}" --batch 1 --seq 2048 --dequantized-layers 32
    "$dir/tunebook-bench" "${qlora[@]}" --batch 4 --seq 2048 --dequantized-layers 32
    "$dir/tunebook-bench" "${small[@]}" --optimizer adamw_8bit --keep-dequantized
    "$dir/tunebook-bench" "${small[@]}" --optimizer paged_adamw_8bit "${host[@]}" --vram-cap 6GiB
    "$dir/tunebook-bench" "${small[@]}" --optimizer paged_adamw_8bit "${host[@]}" --keep-dequantized-modules q_proj,k_proj,v_proj,o_proj,up_proj
    "$dir/tunebook-bench" nf4 --device cuda
    "$dir/tunebook-bench" load --random-weights --device cuda --r 64 --dir /dev/shm
    # 7B on all cores, base and result in memory: 29 GB of it.
    "$dir/tunebook-bench" merge --dir /dev/shm
    "$dir/tunebook-bench" merge --dir /dev/shm --onto dequantized
    "$dir/tunebook-bench" generate --random-weights --device cuda --r 64
    "$dir/tunebook-bench" generate --random-weights --device cuda --method inference
}

memory() {
    "$dir/tunebook-bench" memory --device cuda --gpu h100
}

# racecheck is slow in the products of the library and fails in those for bf16, which it need not look at: each test alone, f32 where
# there are products.
sanitize() {
    local tool test
    for tool in memcheck initcheck; do
        compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 "$dir/unit" engine::cuda::tests --test-threads 1 \
            --skip golden --skip optimizer
    done
    while read -r test; do
        TUNEBOOK_TEST_F32=1 compute-sanitizer --tool racecheck --kernel-name-exclude kns=gemm --error-exitcode 1 \
            "$dir/unit" --exact "$test" --test-threads 1
    done < <("$dir/unit" engine::cuda::tests --list | sed -n 's/: test$//p' | grep -v -e golden -e cross_entropy)
}

for part in "$@"; do "$part"; done
