// Operator B: the operator of extension.cc, computed in oneDNN's own layouts, so that no reorder stands around it, with
// grad_req write, add and null, in float32, bfloat16 and float16. Replaces the compute functions that the extension
// interface registered; shapes, types and the gradient's node stay its own.
#include "group_norm.h"
#include "mxnet_inside.h"
#include "nesterov.h"

namespace gn_gluon {
namespace {

using Arrays = std::vector<mxnet::NDArray>;
using Requests = std::vector<mxnet::OpReqType>;
using mxnet::NDArray;

constexpr char kForward[] = "gn_gluon_group_norm", kBackward[] = "_backward_gn_gluon_group_norm";
constexpr char kUpdate[] = "gn_gluon_nesterov_update";

int64_t pixels_of(const mxnet::TShape& shape) {
  int64_t pixels = 1;
  for (int i = 2; i < shape.ndim(); ++i) pixels *= shape[i];
  return pixels;
}

// The period (group_norm.h) of an array's layout: 1 for MXNet's own, 0 for one that the kernels do not know.
int64_t period_of(const NDArray& array) {
  const dnnl_memory_desc_t* d = descriptor(array);
  if (!d) return 1;
  const mxnet::TShape& shape = array.shape();
  if (d->format_kind != dnnl_blocked || d->ndims != shape.ndim() || d->ndims < 3 || d->offset0 != 0) return 0;
  const auto& blocking = d->format_desc.blocking;
  const int64_t channels = shape[1];
  int64_t period = channels;
  if (blocking.inner_nblks == 1 && blocking.inner_idxs[0] == 1)
    period = blocking.inner_blks[0];
  else if (blocking.inner_nblks != 0)
    return 0;
  for (int i = 0; i < d->ndims; ++i)
    if (d->dims[i] != shape[i] || d->padded_dims[i] != shape[i]) return 0;
  int64_t stride = period;
  for (int i = d->ndims - 1; i >= 2; --i) {
    if (blocking.strides[i] != stride) return 0;
    stride *= shape[i];
  }
  if (blocking.strides[0] != channels * pixels_of(shape)) return 0;
  if (blocking.strides[1] != (blocking.inner_nblks ? stride : 1)) return 0;
  return period;
}

Type type_of(const NDArray& array) {
  switch (array.dtype()) {
    case mshadow::kFloat32: return Type::float32;
    case mshadow::kFloat16: return Type::float16;
    case mshadow::kBfloat16: return Type::bfloat16;
  }
  LOG(FATAL) << "GroupNorm takes float32, float16 and bfloat16";
  return Type::float32;
}

Shape shape_of(const nnvm::NodeAttrs& attributes, const NDArray& x, const NDArray& mean) {
  return {x.shape()[0], x.shape()[1], pixels_of(x.shape()), mean.shape()[2],
          std::stof(attribute(attributes, "epsilon", "1e-5"))};
}

// Reorders what does not have the operator's layout, and keeps the copies until the kernel is done. A reorder is only
// registered by MXNet's stream: it is submitted at once, but what the stream holds may be freed only at the end.
class Layout {
 public:
  // The layout of x, or MXNet's own where the kernels do not take it.
  explicit Layout(const NDArray& x) : period_(period_of(x)) {
    if (period_ == 0 || !takes(type_of(x), period_, x.shape()[1])) period_ = 1;
    if (period_ != 1) desc_ = x.ptr_->mkl_mem_->desc;
  }
  ~Layout() { mxnet::MKLDNNStream::Get()->Submit(true); }

  // MXNet's own, where `array`, to be written or added to, cannot have that of x.
  void require(const NDArray& array, mxnet::OpReqType request) {
    if (array.IsView() || (request == mxnet::kAddTo && period_of(array) != period_)) period_ = 1;
  }

  int64_t period() const { return period_; }

  const void* input(const NDArray& array) {
    if (period_of(array) == period_) return first_byte(array);
    if (period_ == 1) {
      copies_.push_back(array.Reorder2Default());
    } else {
      const mkldnn::memory* memory = array.GetMKLDNNDataReorder(desc_);
      mxnet::MKLDNNStream::Get()->Submit(false);
      // An NDArray of the stream's memory, as the way to its address: dnnl_memory_get_data_handle is not exported.
      copies_.push_back(NDArray(std::shared_ptr<mkldnn::memory>(const_cast<mkldnn::memory*>(memory),
                                                                [](mkldnn::memory*) {})));
    }
    return first_byte(copies_.back());
  }

  // To be called after all inputs are taken: an output may share their memory.
  void* output(const NDArray& array, mxnet::OpReqType request) {
    if (request == mxnet::kNullOp) return nullptr;
    NDArray& writable = const_cast<NDArray&>(array);
    if (request == mxnet::kAddTo) {
      if (period_ == 1 && array.IsMKLDNNData()) array.ptr_->Reorder2Default();
    } else if (period_ == 1) {
      writable.InvalidateMKLDNNData();
    } else {
      writable.CreateMKLDNNData(desc_);
      mxnet::MKLDNNStream::Get()->Submit(false);
    }
    return first_byte(array);
  }

 private:
  int64_t period_;
  mkldnn::memory::desc desc_;
  std::list<NDArray> copies_;
};

const float* parameter(const NDArray& array, std::list<NDArray>* copies) {
  copies->push_back(array.Reorder2Default());
  return static_cast<const float*>(first_byte(copies->back()));
}

float* small_output(const NDArray& array, mxnet::OpReqType request) {
  if (request == mxnet::kNullOp) return nullptr;
  const_cast<NDArray&>(array).InvalidateMKLDNNData();
  return static_cast<float*>(first_byte(array));
}

void compute_forward(const nnvm::NodeAttrs& attributes, const mxnet::OpContext&, const Arrays& in,
                     const Requests& request, const Arrays& out) {
  CHECK(request[0] != mxnet::kAddTo) << "GroupNorm's output cannot be added to what is there";
  if (request[0] == mxnet::kNullOp) return;
  std::list<NDArray> copies;
  Layout layout(in[0]);
  layout.require(out[0], request[0]);
  Forward a;
  a.type = type_of(in[0]);
  a.period = layout.period();
  a.relu = attribute(attributes, "relu", "0") == "1";
  a.x = layout.input(in[0]);
  a.residual = in.size() > 3 ? layout.input(in[3]) : nullptr;
  a.gamma = parameter(in[1], &copies);
  a.beta = parameter(in[2], &copies);
  a.y = layout.output(out[0], request[0]);
  a.mean = small_output(out[1], mxnet::kWriteTo);
  a.rstd = small_output(out[2], mxnet::kWriteTo);
  forward(shape_of(attributes, in[0], out[1]), a);
}

void compute_backward(const nnvm::NodeAttrs& attributes, const mxnet::OpContext&, const Arrays& in,
                      const Requests& request, const Arrays& out) {
  const bool residual = out.size() > 3;
  const NDArray* inputs = in.data() + 3;  // after the gradients of y, mean and rstd
  const NDArray* outputs = inputs + out.size();
  std::list<NDArray> copies;
  Layout layout(inputs[0]);
  layout.require(out[0], request[0]);
  if (residual) layout.require(out[3], request[3]);
  Backward a;
  a.type = type_of(inputs[0]);
  a.period = layout.period();
  a.relu = attribute(attributes, "relu", "0") == "1";
  a.residual = residual;
  a.dy = layout.input(in[0]);
  a.x = layout.input(inputs[0]);
  a.y = a.relu && residual ? layout.input(outputs[0]) : nullptr;
  a.gamma = parameter(inputs[1], &copies);
  a.beta = parameter(inputs[2], &copies);
  a.mean = parameter(outputs[1], &copies);
  a.rstd = parameter(outputs[2], &copies);
  a.dx = layout.output(out[0], request[0]);
  a.dresidual = residual ? layout.output(out[3], request[3]) : nullptr;
  a.dgamma = small_output(out[1], request[1]);
  a.dbeta = small_output(out[2], request[2]);
  a.add_dx = request[0] == mxnet::kAddTo;
  a.add_dresidual = residual && request[3] == mxnet::kAddTo;
  a.add_dgamma = request[1] == mxnet::kAddTo;
  a.add_dbeta = request[2] == mxnet::kAddTo;
  backward(shape_of(attributes, inputs[0], outputs[1]), a);
}

// "rates" and "decays": a number for each array, with a space after each.
void compute_update(const nnvm::NodeAttrs& attributes, const mxnet::OpContext&, const Arrays& in, const Requests&,
                    const Arrays&) {
  std::list<NDArray> copies;
  std::vector<UpdatedArray> arrays(in.size() / 3);
  std::istringstream rates(attribute(attributes, "rates", "")), decays(attribute(attributes, "decays", ""));
  for (size_t i = 0; i < arrays.size(); ++i) {
    for (const NDArray* changed : {&in[3 * i], &in[3 * i + 2]})
      if (changed->IsMKLDNNData()) changed->ptr_->Reorder2Default();
    CHECK(rates >> arrays[i].rate && decays >> arrays[i].decay) << "a rate and a decay for each array";
    arrays[i].weight = static_cast<float*>(first_byte(in[3 * i]));
    arrays[i].gradient = parameter(in[3 * i + 1], &copies);
    arrays[i].velocity = static_cast<float*>(first_byte(in[3 * i + 2]));
    arrays[i].size = in[3 * i].shape().Size();
  }
  nesterov_update(arrays, std::stof(attribute(attributes, "momentum", "0")),
                  std::stof(attribute(attributes, "rescale", "1")));
}

}  // namespace
}  // namespace gn_gluon

// Replaces the operators' compute functions. Returns null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* gn_gluon_install() {
  using namespace gn_gluon;
  static std::string problem;
  try {
    using Pairs = std::vector<std::pair<int, int>>;
    set_attribute<mxnet::FComputeEx>(kForward, "FComputeEx<cpu>", compute_forward);
    set_attribute<mxnet::FComputeEx>(kBackward, "FComputeEx<cpu>", compute_backward);
    set_attribute<mxnet::FComputeEx>(kUpdate, "FComputeEx<cpu>", compute_update);
    set_attribute<bool>(kUpdate, "TIsMKLDNN", true);
    // Inputs come in whatever layout they have.
    set_attribute<bool>(kForward, "TIsMKLDNN", true);
    set_attribute<bool>(kBackward, "TIsMKLDNN", true);
    // mean and rstd are for the backward pass alone.
    set_attribute<nnvm::FNumVisibleOutputs>(kForward, "FNumVisibleOutputs",
                                            [](const nnvm::NodeAttrs&) -> uint32_t { return 1; });
    // x or the residual may become y where nothing else needs them, and dy dx: memory that is in the cache already.
    set_attribute<nnvm::FInplaceOption>(kForward, "FInplaceOption", [](const nnvm::NodeAttrs& attributes) {
      return attribute(attributes, "residual", "0") == "1" ? Pairs{{3, 0}, {0, 0}} : Pairs{{0, 0}};
    });
    set_attribute<nnvm::FInplaceOption>(kBackward, "FInplaceOption",
                                        [](const nnvm::NodeAttrs&) { return Pairs{{0, 0}}; });
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
