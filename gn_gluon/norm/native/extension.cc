// Operator A: GroupNorm through MXNet's public extension interface (lib_api.h), on the CPU and on NVIDIA GPUs.
//
//   y, mean, rstd = gn_gluon_group_norm(x, gamma, beta [, residual], num_groups= or channels_per_group=, epsilon=,
//                                       relu=0|1, residual=0|1)
//
// x, residual, y: (N, C, ...) in float32 or float16; gamma, beta: (C,) float32; mean, rstd: (2, N, G) float32, for the
// backward pass only (group_norm.h). The interface hands over plain NCHW: MXNet converts what oneDNN left otherwise.
// It never says whether a gradient is to be written or added to, so the layer must see to it that it is written.
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_launch.h"
#include "group_norm.h"
#include "mxnet/lib_api.h"

namespace {

using namespace mxnet::ext;
using Attributes = std::unordered_map<std::string, std::string>;
using Tensors = std::vector<MXTensor>;

constexpr int kBfloat16 = 12;  // MXNet's number; the interface has no tensors of it
bool takes_bfloat16 = false;   // when operator B (onednn.cc) computes

std::string attribute(const Attributes& attributes, const char* name, const char* otherwise) {
  const auto found = attributes.find(name);
  return found == attributes.end() ? otherwise : found->second;
}

bool has_residual(const Attributes& attributes) { return attribute(attributes, "residual", "0") == "1"; }
bool has_relu(const Attributes& attributes) { return attribute(attributes, "relu", "0") == "1"; }

// The number of groups of `channels` channels; 0 if they cannot be split so.
int64_t groups_of(const Attributes& attributes, int64_t channels) {
  const int64_t groups = std::stoll(attribute(attributes, "num_groups", "0"));
  const int64_t per_group = groups ? channels / groups : std::stoll(attribute(attributes, "channels_per_group", "0"));
  if (per_group < 1 || channels % per_group || (groups && per_group * groups != channels)) return 0;
  return channels / per_group;
}

gn_gluon::Shape shape_of(const Attributes& attributes, const std::vector<int64_t>& dimensions) {
  gn_gluon::Shape shape;
  shape.samples = dimensions[0];
  shape.channels = dimensions[1];
  shape.pixels = 1;
  for (size_t i = 2; i < dimensions.size(); ++i) shape.pixels *= dimensions[i];
  shape.groups = groups_of(attributes, shape.channels);
  shape.epsilon = std::stof(attribute(attributes, "epsilon", "1e-5"));
  return shape;
}

gn_gluon::Type type_of(const MXTensor& tensor) {
  if (tensor.dtype == kFloat32) return gn_gluon::Type::float32;
  if (tensor.dtype == kFloat16) return gn_gluon::Type::float16;
  throw std::runtime_error("gn_gluon_group_norm takes float32 and float16 here");
}

// An exception must not cross the interface.
template <typename Work>
MXReturnValue guarded(const Work& work) {
  try {
    work();
    return MX_SUCCESS;
  } catch (const std::exception& error) {
    MX_ERROR_MSG << error.what();
    return MX_FAIL;
  }
}

gn_gluon::Forward forward_arguments(const Attributes& attributes, Tensors& in, Tensors& out) {
  return {type_of(in[0]),          1,
          has_relu(attributes),    in[0].data_ptr,
          has_residual(attributes) ? in[3].data_ptr : nullptr,
          in[1].data<float>(),     in[2].data<float>(),
          out[0].data_ptr,         out[1].data<float>(),
          out[2].data<float>()};
}

// Inputs: the gradients of the three outputs, the inputs, the outputs. Outputs: the gradients of the inputs.
gn_gluon::Backward backward_arguments(const Attributes& attributes, Tensors& inputs, Tensors& out) {
  const bool residual = has_residual(attributes);
  MXTensor* in = inputs.data() + 3;
  MXTensor* result = in + (residual ? 4 : 3);
  return {type_of(in[0]),
          1,
          has_relu(attributes),
          inputs[0].data_ptr,
          in[0].data_ptr,
          result[0].data_ptr,
          residual,
          in[1].data<float>(),
          in[2].data<float>(),
          result[1].data<float>(),
          result[2].data<float>(),
          out[0].data_ptr,
          residual ? out[3].data_ptr : nullptr,
          out[1].data<float>(),
          out[2].data<float>(),
          false,
          false,
          false,
          false};
}

void* allocate(const OpResource& resource, int64_t bytes) {
  return bytes ? resource.alloc_gpu(static_cast<int>(bytes)) : nullptr;
}

MXReturnValue forward_cpu(const Attributes& attributes, Tensors* in, Tensors* out, const OpResource&) {
  return guarded([&] {
    gn_gluon::forward(shape_of(attributes, (*in)[0].shape), forward_arguments(attributes, *in, *out));
  });
}

MXReturnValue backward_cpu(const Attributes& attributes, Tensors* in, Tensors* out, const OpResource&) {
  return guarded([&] {
    gn_gluon::backward(shape_of(attributes, (*in)[3].shape), backward_arguments(attributes, *in, *out));
  });
}

MXReturnValue forward_gpu(const Attributes& attributes, Tensors* in, Tensors* out, const OpResource& resource) {
  return guarded([&] {
    const gn_gluon::Shape shape = shape_of(attributes, (*in)[0].shape);
    const gn_gluon::Forward arguments = forward_arguments(attributes, *in, *out);
    void* workspace = allocate(resource, gn_gluon::cuda_workspace(shape, arguments));
    gn_gluon::cuda_forward(shape, arguments, workspace, resource.get_cuda_stream());
  });
}

MXReturnValue backward_gpu(const Attributes& attributes, Tensors* in, Tensors* out, const OpResource& resource) {
  return guarded([&] {
    const gn_gluon::Shape shape = shape_of(attributes, (*in)[3].shape);
    const gn_gluon::Backward arguments = backward_arguments(attributes, *in, *out);
    void* workspace = allocate(resource, gn_gluon::cuda_workspace(shape, arguments));
    gn_gluon::cuda_backward(shape, arguments, workspace, resource.get_cuda_stream());
  });
}

MXReturnValue parse_attributes(const Attributes& attributes, int* num_inputs, int* num_outputs) {
  *num_inputs = has_residual(attributes) ? 4 : 3;
  *num_outputs = 3;
  return MX_SUCCESS;
}

MXReturnValue infer_type(const Attributes&, std::vector<int>* inputs, std::vector<int>* outputs) {
  const int type = (*inputs)[0];
  if (type == -1) return MX_FAIL;  // not known yet
  if (type != kFloat32 && type != kFloat16 && !(type == kBfloat16 && takes_bfloat16)) {
    MX_ERROR_MSG << "GroupNorm was not told of this type: call cast of the layer or of its network with it before";
    return MX_FAIL;
  }
  (*inputs)[1] = (*inputs)[2] = (*outputs)[1] = (*outputs)[2] = kFloat32;
  for (size_t i = 3; i < inputs->size(); ++i) (*inputs)[i] = type;
  (*outputs)[0] = type;
  return MX_SUCCESS;
}

MXReturnValue infer_shape(const Attributes& attributes, std::vector<std::vector<unsigned>>* inputs,
                          std::vector<std::vector<unsigned>>* outputs) {
  const std::vector<unsigned> x = (*inputs)[0];
  if (x.size() < 2) {
    MX_ERROR_MSG << "GroupNorm takes (N, C, ...), here are " << x.size() << " dimensions";
    return MX_FAIL;
  }
  const unsigned groups = groups_of(attributes, x[1]);
  if (!groups) {
    const char* argument = attributes.count("num_groups") ? "num_groups" : "channels_per_group";
    MX_ERROR_MSG << argument << "=" << attribute(attributes, argument, "?") << " does not divide the " << x[1]
                 << " channels of GroupNorm";
    return MX_FAIL;
  }
  (*inputs)[1] = (*inputs)[2] = {x[1]};
  for (size_t i = 3; i < inputs->size(); ++i) (*inputs)[i] = x;
  (*outputs)[0] = x;
  (*outputs)[1] = (*outputs)[2] = {2, x[0], groups};
  return MX_SUCCESS;
}

}  // namespace

REGISTER_OP(gn_gluon_group_norm)
    .setForward(forward_cpu, "cpu")
    .setBackward(backward_cpu, "cpu")
    .setForward(forward_gpu, "gpu")
    .setBackward(backward_gpu, "gpu")
    .setParseAttrs(parse_attributes)
    .setInferType(infer_type)
    .setInferShape(infer_shape);

// The update of nesterov.h: (weight, gradient, velocity) of each array in turn, weights and velocities are changed.
// Computed by operator B alone: this interface hands over a copy of what is in oneDNN's layout, and what is written
// into a copy is lost.
namespace {

MXReturnValue refuse(const Attributes&, Tensors*, Tensors*, const OpResource&) {
  MX_ERROR_MSG << "gn_gluon_nesterov_update needs the native operator of gn_gluon";
  return MX_FAIL;
}

int count_inputs(const Attributes& attributes) { return 3 * std::stoi(attribute(attributes, "num_arrays", "1")); }

MXReturnValue parse_update(const Attributes& attributes, int* num_inputs, int* num_outputs) {
  *num_inputs = count_inputs(attributes);
  *num_outputs = 1;  // an operator must have one
  return MX_SUCCESS;
}

MXReturnValue infer_update_type(const Attributes&, std::vector<int>* inputs, std::vector<int>* outputs) {
  for (int& type : *inputs) type = kFloat32;
  (*outputs)[0] = kFloat32;
  return MX_SUCCESS;
}

MXReturnValue infer_update_shape(const Attributes&, std::vector<std::vector<unsigned>>*,
                                 std::vector<std::vector<unsigned>>* outputs) {
  (*outputs)[0] = {1};
  return MX_SUCCESS;
}

MXReturnValue updated_inputs(const Attributes& attributes, std::vector<int>* indices) {
  for (int i = 0; i < count_inputs(attributes); ++i)
    if (i % 3 != 1) indices->push_back(i);
  return MX_SUCCESS;
}

}  // namespace

REGISTER_OP(gn_gluon_nesterov_update)
    .setForward(refuse, "cpu")
    .setParseAttrs(parse_update)
    .setInferType(infer_update_type)
    .setInferShape(infer_update_shape)
    .setMutateInputs(updated_inputs);

MXReturnValue initialize(int version) {
  if (version >= 10900) return MX_SUCCESS;
  MX_ERROR_MSG << "the operator of gn_gluon needs MXNet 1.9, this is " << version;
  return MX_FAIL;
}

// Called when operator B was installed.
extern "C" __attribute__((visibility("default"))) void gn_gluon_takes_bfloat16() { takes_bfloat16 = true; }

// For `python -m gn_gluon.info`.
extern "C" __attribute__((visibility("default"))) const char* gn_gluon_instruction_set() {
  return gn_gluon::instruction_set();
}
