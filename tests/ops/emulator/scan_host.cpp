// The selective scan's kernels as a library: int scan_launch(name, blocks, threads a block, shared bytes, params).
#define SCAN_HOST
#include "emulator.h"
//
#include "scan_common.cuh"
#include "scan_backward.cu"
#include "scan_forward.cu"
#include "scan_chunk_gradients.cu"
#include "scan_sums.cu"

extern "C" int scan_launch(const char* name, int blocks, int threads, int shared_bytes, const Params* p) {
#define CASE(kernel)                                   \
  if (!strcmp(name, #kernel)) {                        \
    run_blocks<Params>(kernel, *p, blocks, threads, shared_bytes); \
    return 0;                                          \
  }
  CASE(scan_forward)
  CASE(scan_chunk_states)
  CASE(scan_backward)
  CASE(scan_chunk_gradients)
  CASE(scan_pass_states)
  CASE(scan_pass_gradients)
  CASE(scan_sum)
  return 1;
}
