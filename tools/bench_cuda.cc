// The GPU's kernels as C functions, for bench_cuda.py: errors come back as text. With workspace_bytes a function only
// says there how much workspace the call needs.
#include <exception>
#include <string>

#include "cuda_launch.h"

namespace {

template <typename Work>
const char* text_of_error(const Work& work) {
  static thread_local std::string text;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

gn_gluon::Shape shape_of(const int64_t* sizes, float epsilon) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], epsilon};
}

}  // namespace

extern "C" {

void block_memory(int bytes) { gn_gluon::cuda_set_block_memory(bytes); }

const char* forward(const int64_t* sizes, float epsilon, int type, bool relu, const void* x, const void* residual,
                    const float* gamma, const float* beta, void* y, float* mean, float* rstd, void* workspace,
                    void* stream, int64_t* workspace_bytes) {
  return text_of_error([&] {
    const gn_gluon::Shape shape = shape_of(sizes, epsilon);
    gn_gluon::Forward arguments = {};
    arguments.type = static_cast<gn_gluon::Type>(type);
    arguments.period = 1;
    arguments.relu = relu;
    arguments.x = x;
    arguments.residual = residual;
    arguments.gamma = gamma;
    arguments.beta = beta;
    arguments.y = y;
    arguments.mean = mean;
    arguments.rstd = rstd;
    if (workspace_bytes) *workspace_bytes = gn_gluon::cuda_workspace(shape, arguments);
    else gn_gluon::cuda_forward(shape, arguments, workspace, stream);
  });
}

const char* backward(const int64_t* sizes, float epsilon, int type, bool relu, bool residual, const void* dy,
                     const void* x, const void* y, const float* gamma, const float* beta, const float* mean,
                     const float* rstd, void* dx, void* dresidual, float* dgamma, float* dbeta, void* workspace,
                     void* stream, int64_t* workspace_bytes) {
  return text_of_error([&] {
    const gn_gluon::Shape shape = shape_of(sizes, epsilon);
    gn_gluon::Backward arguments = {};
    arguments.type = static_cast<gn_gluon::Type>(type);
    arguments.period = 1;
    arguments.relu = relu;
    arguments.residual = residual;
    arguments.dy = dy;
    arguments.x = x;
    arguments.y = y;
    arguments.gamma = gamma;
    arguments.beta = beta;
    arguments.mean = mean;
    arguments.rstd = rstd;
    arguments.dx = dx;
    arguments.dresidual = dresidual;
    arguments.dgamma = dgamma;
    arguments.dbeta = dbeta;
    if (workspace_bytes) *workspace_bytes = gn_gluon::cuda_workspace(shape, arguments);
    else gn_gluon::cuda_backward(shape, arguments, workspace, stream);
  });
}

}  // extern "C"
