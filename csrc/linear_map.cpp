// The linear maps that the inverse problem is made of; Python and the solvers' loops hold the same objects.
//   ConvMap       W: z ↦ w ⋆ pad(z), never stored as a matrix, with its exact adjoint
//   CirculantMap  z ↦ F⁻¹ K F z, one C_out × C_in block K(ω) per frequency: circular convolutions and their inverses
//   DiagonalMap, ComposedMap, AdjointMap   the algebra: row scaling is D∘W, the normal equations W∘Wᵀ
// Vectors are images flattened in the order (C, *spatial). A map computes in the dtype of what it is given.
#include "linear_map.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>

#include "convolution.h"
#include "stencil.h"

namespace convbn {

using at::Tensor;

namespace {

using LinearMapPtr = std::shared_ptr<LinearMap>;

std::vector<int64_t> concat(std::initializer_list<int64_t> head, at::IntArrayRef tail) {
  std::vector<int64_t> result(head);
  result.insert(result.end(), tail.begin(), tail.end());
  return result;
}

struct ConvMap final : LinearMap {
  ConvMap(const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
          std::vector<int64_t> dilation, int64_t groups, const std::string& padding_mode,
          const std::vector<int64_t>& spatial)
      : weight_(weight.detach()),
        geometry_{std::move(stride), std::move(padding), std::move(dilation), groups, parse_padding_mode(padding_mode)},
        input_sizes_(concat({-1, groups * weight.size(1)}, spatial)) {
    output_sizes_ = geometry_.output_sizes(input_sizes_, weight.sizes());
    output_sizes_[0] = -1;
  }

  Tensor apply(const Tensor& v) const override {
    const c10::NoGradGuard no_grad;
    const Tensor input = v.reshape(input_sizes_), weight = weight_.to(v.scalar_type());
    const bool stencil = stencil_applies(input, weight, geometry_);
    return (stencil ? stencil_convolve : convolve)(input, weight, geometry_).flatten(1);
  }

  Tensor apply_adjoint(const Tensor& u) const override {
    const c10::NoGradGuard no_grad;
    auto input_sizes = input_sizes_;
    input_sizes[0] = u.size(0);
    const Tensor grad = u.reshape(output_sizes_);
    return convolve_adjoint_input(grad, weight_.to(u.scalar_type()), input_sizes, geometry_).flatten(1);
  }

  std::optional<Convolution> convolution() const override {
    return Convolution{weight_, geometry_, {input_sizes_.begin() + 2, input_sizes_.end()}, std::nullopt};
  }

  Tensor weight_;
  ConvGeometry geometry_;
  std::vector<int64_t> input_sizes_, output_sizes_;  // -1 stands for the batch
};

// blocks (F, G, C_out/G, C_in/G), complex; F runs over rfftn's half spectrum of `spatial`, last axis halved.
// One small matrix product per frequency, with the batch as its columns.
struct CirculantMap final : LinearMap {
  CirculantMap(const Tensor& blocks, std::vector<int64_t> spatial)
      : blocks_(blocks.detach()), adjoint_(blocks_.mH().contiguous()), spatial_(std::move(spatial)) {
    TORCH_CHECK_VALUE(blocks.dim() == 4 && blocks.is_complex(),
                      "CirculantMap: blocks must be complex with shape (F, G, C_out/G, C_in/G), got ", blocks.sizes());
    for (size_t axis = 0; axis < spatial_.size(); ++axis) axes_.push_back(static_cast<int64_t>(axis) + 2);
  }

  Tensor apply(const Tensor& v) const override { return multiply(blocks_, v); }
  Tensor apply_adjoint(const Tensor& u) const override { return multiply(adjoint_, u); }

  Tensor multiply(const Tensor& blocks, const Tensor& v) const {
    const c10::NoGradGuard no_grad;
    const int64_t batch = v.size(0), F = blocks.size(0), G = blocks.size(1), out = blocks.size(2), in = blocks.size(3);
    const Tensor K = blocks.to(c10::toComplexType(v.scalar_type())).flatten(0, 1);  // (F·G, out, in)
    const Tensor spectrum = at::fft_rfftn(v.reshape(concat({batch, G * in}, spatial_)), {}, axes_);
    const Tensor columns = spectrum.reshape({batch, G, in, F}).permute({3, 1, 2, 0}).reshape({F * G, in, batch});
    const Tensor product = at::bmm(K, columns).reshape({F, G, out, batch}).permute({3, 1, 2, 0});
    auto sizes = spectrum.sizes().vec();
    sizes[1] = G * out;
    return at::fft_irfftn(product.reshape(sizes), spatial_, axes_).flatten(1);
  }

  Tensor blocks_, adjoint_;
  std::vector<int64_t> spatial_, axes_;
};

struct DiagonalMap final : LinearMap {
  explicit DiagonalMap(const Tensor& diagonal) : diagonal_(diagonal.detach().flatten()) {}
  Tensor apply(const Tensor& v) const override { return v * diagonal_.to(v.scalar_type()); }
  Tensor apply_adjoint(const Tensor& u) const override { return u * diagonal_.to(u.scalar_type()); }
  Tensor diagonal_;  // (n,), real
};

struct ComposedMap final : LinearMap {
  ComposedMap(LinearMapPtr outer, LinearMapPtr inner) : outer_(std::move(outer)), inner_(std::move(inner)) {}
  Tensor apply(const Tensor& v) const override { return outer_->apply(inner_->apply(v)); }
  Tensor apply_adjoint(const Tensor& u) const override { return inner_->apply_adjoint(outer_->apply_adjoint(u)); }
  std::optional<Convolution> convolution() const override {  // D W with a diagonal D
    const auto* diagonal = dynamic_cast<const DiagonalMap*>(outer_.get());
    auto result = diagonal ? inner_->convolution() : std::nullopt;
    if (result) result->row_scale = result->row_scale ? *result->row_scale * diagonal->diagonal_ : diagonal->diagonal_;
    return result;
  }
  LinearMapPtr outer_, inner_;
};

struct AdjointMap final : LinearMap {
  explicit AdjointMap(LinearMapPtr map) : map_(std::move(map)) {}
  Tensor apply(const Tensor& v) const override { return map_->apply_adjoint(v); }
  Tensor apply_adjoint(const Tensor& u) const override { return map_->apply(u); }
  LinearMapPtr map_;
};

}  // namespace

void bind_linear_maps(pybind11::module_& m) {
  namespace py = pybind11;
  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<LinearMap, LinearMapPtr>(m, "LinearMap", "A linear map on (B, n) batches of flattened vectors")
      .def("apply", &LinearMap::apply, py::arg("v"), no_gil(), "(B, n) -> (B, m)")
      .def("apply_adjoint", &LinearMap::apply_adjoint, py::arg("u"), no_gil(), "(B, m) -> (B, n)");
  py::class_<ConvMap, LinearMap, std::shared_ptr<ConvMap>>(m, "ConvMap")
      .def(py::init<const Tensor&, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int64_t,
                    const std::string&, const std::vector<int64_t>&>(),
           py::arg("weight"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
           py::arg("padding_mode"), py::arg("spatial"));
  py::class_<CirculantMap, LinearMap, std::shared_ptr<CirculantMap>>(m, "CirculantMap")
      .def(py::init<const Tensor&, std::vector<int64_t>>(), py::arg("blocks"), py::arg("spatial"));
  py::class_<DiagonalMap, LinearMap, std::shared_ptr<DiagonalMap>>(m, "DiagonalMap")
      .def(py::init<const Tensor&>(), py::arg("diagonal"));
  py::class_<ComposedMap, LinearMap, std::shared_ptr<ComposedMap>>(m, "ComposedMap")
      .def(py::init<LinearMapPtr, LinearMapPtr>(), py::arg("outer"), py::arg("inner"));
  py::class_<AdjointMap, LinearMap, std::shared_ptr<AdjointMap>>(m, "AdjointMap")
      .def(py::init<LinearMapPtr>(), py::arg("map"));
}

}  // namespace convbn
