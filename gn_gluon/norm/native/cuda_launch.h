// Group Normalization on NVIDIA GPUs: group_norm.h's arguments with arrays in the GPU's memory, period 1 and no add_*.
// Needs neither CUDA's headers nor nvcc: the driver and NVRTC are looked for when the first call needs them. A CUDA
// context must be current. What goes wrong is thrown as std::runtime_error, one sentence before NVRTC's log if any.
#pragma once
#include "group_norm.h"

namespace gn_gluon {

// Bytes of the GPU's memory that a call needs for itself; at most 2^31 - 1.
int64_t cuda_workspace(const Shape& shape, const Forward& arguments);
int64_t cuda_workspace(const Shape& shape, const Backward& arguments);

// Launch on a stream (CUstream or cudaStream_t) and return at once. workspace is aligned to 16 bytes.
void cuda_forward(const Shape& shape, const Forward& arguments, void* workspace, void* stream);
void cuda_backward(const Shape& shape, const Backward& arguments, void* workspace, void* stream);

// For measurements: the shared memory of a block, in bytes; 0 is the choice of cuda_launch.cc.
void cuda_set_block_memory(int bytes);

}  // namespace gn_gluon
