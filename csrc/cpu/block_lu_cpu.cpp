// W⁻¹ of a convolution by block-tridiagonal LU from both ends (spec S15), float64, and the solve of a whole layer with
// it.
//
// Along one image axis, groups of rows that are as high as the kernel reaches couple only with their neighbours, so in
// the order (group, everything else) W has blocks L_r, D_r, U_r, r = 0 … R−1, of which L and U are as sparse as the
// kernel. Eliminating from both ends towards the middle group p (two threads, and half as many steps for rounding to
// grow in: pivoting happens inside a block only):
//   S_r = D_r − L_r G_{r−1} U_{r−1}  (r < p),   S_r = D_r − U_r G_{r+1} L_{r+1}  (r > p),   S_p = D_p − both,
//   G_r = S_r⁻¹
//   W x = b, inward:   t_r = G_r (b_r − L_r t_{r−1}),   from the other end  t_r = G_r (b_r − U_r t_{r+1})
//            middle:   x_p = G_p (b_p − L_p t_{p−1} − U_p t_{p+1})
//            outward:  x_r = t_r − G_r U_r x_{r+1},     to the other end    x_r = t_r − G_r L_r x_{r−1}
// Only the G_r are stored. Wᵀ is solved by the same sweeps with G_rᵀ and the rows of Wᵀ. R = 1 is the dense inverse.
//
// Right-hand sides are columns, up to kPanel of them at a time, in the rows of an (n, columns) panel: sparse rows and
// products then run along the columns in whole registers, whatever the sparsity. A column's arithmetic depends neither
// on the other columns nor on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../linear_map.h"
#include "../panel_lu.h"
#include "block_lu_loops.h"
#include "block_plan.h"

namespace convbn {

using at::Tensor;

namespace {

constexpr int64_t kLine = 8;             // doubles in a cache line: what rows are padded to
constexpr int64_t kPanel = 64;           // most columns that a thread works on at a time
constexpr int64_t kOwnInverse = 512;     // blocks up to this order are inverted here, larger ones by LAPACK
constexpr int64_t kSplitWork = 1 << 18;  // multiplications in a sweep from which two threads pay
constexpr int64_t kRowsPerLook = 64;     // between two looks for ctrl-C
constexpr double kGain = 4;              // a refinement step that gains less is none

int64_t padded(int64_t n) { return (n + kLine - 1) / kLine * kLine; }

Tensor doubles(at::IntArrayRef sizes) { return at::empty(sizes, at::kDouble); }

struct BlockLU final : LinearMap {
  BlockLU(std::shared_ptr<BlockPlan> plan, const Tensor& weight) : plan_(std::move(plan)) {
    const c10::NoGradGuard no_grad;
    const Tensor w = weight.detach().to(at::kDouble).contiguous();
    const auto values = [&](const Rows& rows) {
      std::vector<double> result(rows.tap.size());
      const double* taps = w.const_data_ptr<double>();
      for (size_t e = 0; e < result.size(); ++e) result[e] = taps[rows.tap[e]];
      return result;
    };
    matrix_ = values(plan_->matrix), adjoint_ = values(plan_->adjoint);
    // an odd number of cache lines to a row, so that a column spreads over the cache
    const int64_t m = plan_->group_rows, p = plan_->middle(), ld = (padded(m) / kLine | 1) * kLine;
    inverse_ = doubles({plan_->groups, m, ld});
    InterruptCheck interrupt;
    const auto room = [&] { return at::zeros({plan_->groups > 1 ? 2 : 0, m, ld}, at::kDouble); };
    both_ends([&](int64_t first, int64_t step) {
      const Tensor scratch = room();
      for (int64_t r = first; r != p && interrupt(); r += step) factor(r, {r - step}, scratch, interrupt);
    });
    factor(p, {p - 1, p + 1}, room(), interrupt);
  }

  bool finite() const { return finite_; }
  int64_t size() const { return plan_->n; }

  Tensor apply(const Tensor& b) const override { return solve_rows(b, false); }
  Tensor apply_adjoint(const Tensor& b) const override { return solve_rows(b, true); }

  Tensor solve_rows(const Tensor& b, bool transposed) const {
    TORCH_CHECK_VALUE(b.dim() == 2 && b.size(1) == plan_->n, "BlockLU: b must have shape (B, ", plan_->n, "), got ",
                      b.sizes());
    const c10::NoGradGuard no_grad;
    const Tensor given = b.to(at::kDouble).contiguous();
    const Tensor result = at::empty_like(given);
    const std::vector<double> zeros(plan_->n, 0.0), ones(plan_->n, 1.0);
    over_panels(b.size(0), [&](int64_t first, int64_t count, int64_t width) {
      const Tensor panel = doubles({plan_->n, width});
      double* x = panel.mutable_data_ptr<double>();
      const int64_t n = plan_->n;
      const int* order = plan_->order.data();
      loops().load_f64(given.const_data_ptr<double>() + first * n, n, count, order, zeros.data(), ones.data(), x, n,
                       width);
      sweeps(x, width, transposed);
      loops().store_f64(x, n, width, order, result.mutable_data_ptr<double>() + first * n, n, count);
    });
    return result.to(b.scalar_type());
  }

  struct Solution {
    Tensor z;         // (B, n) in the dtype of x
    Tensor residual;  // (B,) ‖x − b̂ − Γ W z‖ of that z, in float64, over ‖x‖, or ‖x − b̂‖ where x = 0
    Tensor steps;     // (B,) int64
    Tensor history;   // (B, most steps + 1) relative residuals; NaN behind a row's last step
    Tensor met;       // (B,) bool: solved to rtol or atol. The z of other rows is of no use.
    bool all_met;
  };

  // Γ W z = x − b̂ for x (B, n): z ← round(z + W⁻¹ (Γ⁻¹ (x − b̂) − W z)) in x's dtype, with float64 residuals of that
  // rounded z, while a step gains a factor kGain. scale (Γ, no zeros) and offset (b̂) are (C_out,) float64.
  Solution solve(const Tensor& x, const Tensor& scale, const Tensor& offset, double rtol, double atol) const {
    const c10::NoGradGuard no_grad;
    const Tensor given = x.contiguous();
    const int64_t B = x.size(0);
    Solution out{at::empty_like(given), doubles({B}), at::zeros({B}, at::kLong), {}, {}, true};
    out.met = at::zeros({B}, at::kBool);
    std::vector<std::vector<double>> history(B);
    const PositionScales scales(*plan_, scale, offset);
    InterruptCheck interrupt;
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "BlockLU::solve", [&] {
      over_panels(B, [&](int64_t first, int64_t count, int64_t width) {
        if (!interrupt()) return;
        Panel<scalar_t>{*this, *plan_, scales, given.const_data_ptr<scalar_t>() + first * plan_->n, first, count, width}
            .solve(rtol, atol, out, history);
      });
    });
    size_t longest = 1;
    for (const auto& h : history) longest = std::max(longest, h.size());
    out.history = at::full({B, int64_t(longest)}, std::nan(""), at::kDouble);
    for (int64_t b = 0; b < B; ++b)
      std::copy(history[b].begin(), history[b].end(), out.history.mutable_data_ptr<double>() + b * longest);
    out.all_met = out.met.all().item<bool>();
    return out;
  }

 private:
  // body(first, step) for the groups 0, 1, … and R−1, R−2, … up to the middle one, on two threads.
  template <class Body>
  void both_ends(const Body& body) const {
    const auto side = [&](int64_t s) { s == 0 ? body(0, 1) : body(plan_->groups - 1, -1); };
    const int64_t work = plan_->groups * plan_->group_rows * plan_->group_rows;
    at::parallel_for(0, 2, work < kSplitWork ? 2 : 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) side(s);
    });
  }

  double* inverse(int64_t r) const {
    return inverse_.mutable_data_ptr<double>() + r * inverse_.size(1) * inverse_.size(2);
  }
  int64_t ld() const { return inverse_.size(2); }

  // Y ← Y − (the rows of group r) X with X the rows of the neighbour s; Y and X have N columns.
  void couple(bool transposed, int64_t r, int64_t s, const double* X, double* Y, int64_t N,
              InterruptCheck* interrupt = nullptr) const {
    const Rows& rows = transposed ? plan_->adjoint : plan_->matrix;
    const auto& value = transposed ? adjoint_ : matrix_;
    const int part = s < r ? Rows::lower : Rows::upper;
    for (int64_t i = 0; i < plan_->size(r); ++i) {
      if (interrupt && i % kRowsPerLook == 0 && !(*interrupt)()) return;
      const int64_t begin = rows.begin(plan_->begin(r) + i, part), end = rows.end(plan_->begin(r) + i, part);
      loops().subtract_row(value.data() + begin, rows.column.data() + begin, end - begin, X - plan_->begin(s) * N, N,
                           Y + i * N, N);
    }
  }

  // G_r from its neighbours that are eliminated already; scratch (2, m, ld), its padding zero.
  void factor(int64_t r, std::initializer_list<int64_t> neighbours, const Tensor& scratch, InterruptCheck& interrupt) {
    const int64_t m = plan_->size(r), stride = ld();
    double *G = inverse(r), *K = scratch.mutable_data_ptr<double>(), *T = K + plan_->group_rows * stride;
    std::fill_n(G + m * stride, (plan_->group_rows - m) * stride, 0.0);
    for (int64_t i = 0; i < m; ++i) {
      if (i % kRowsPerLook == 0 && !interrupt()) return;
      std::fill_n(G + i * stride, stride, 0.0);
      const int64_t row = plan_->begin(r) + i;
      for (int64_t e = plan_->matrix.begin(row, Rows::diagonal); e < plan_->matrix.end(row, Rows::diagonal); ++e)
        G[i * stride + plan_->matrix.column[e] - plan_->begin(r)] += matrix_[e];
    }
    for (const int64_t s : neighbours) {  // S ← S − W_rs G_s W_sr
      if (s < 0 || s >= plan_->groups) continue;
      std::fill_n(K, m * stride, 0.0);
      couple(false, r, s, inverse(s), K, stride, &interrupt);  // −W_rs G_s
      loops().transpose(K, stride, T, stride, m, plan_->size(s));
      std::fill_n(K, m * stride, 0.0);
      couple(true, r, s, T, K, stride, &interrupt);  // the rows of W_srᵀ on that: (W_rs G_s W_sr)ᵀ
      loops().transpose(K, stride, T, stride, m, m);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < m; ++j) G[i * stride + j] -= T[i * stride + j];
    }
    invert(G, m, interrupt);
  }

  void invert(double* G, int64_t m, InterruptCheck& interrupt) {
    bool regular = true;
    if (m <= kOwnInverse) {
      const Tensor work = doubles({2 * loops().pivots * ld()});
      std::vector<int> order(2 * m);
      regular = loops().invert(G, m, ld(), work.mutable_data_ptr<double>(), order.data());
    } else {
      const Tensor block = at::from_blob(G, {m, m}, {ld(), 1}, at::kDouble);
      invert_by_panels(block, interrupt);
      regular = std::isfinite(block.sum().item<double>());
    }
    if (!regular) finite_ = false;  // both threads may write it, and the same
  }

  // x ← W⁻¹ x for a panel x (n, width).
  void sweeps(double* x, int64_t width, bool transposed) const {
    const int64_t p = plan_->middle();
    const auto at = [&](int64_t r) { return x + plan_->begin(r) * width; };
    const auto times_inverse = [&](int64_t r, const double* v, double* y, bool add) {
      const int64_t m = plan_->size(r), rs = transposed ? 1 : ld(), cs = transposed ? ld() : 1;
      loops().multiply(inverse(r), rs, cs, v, width, y, width, m, width, m, add);
    };
    const auto scratch = [&] { return doubles({plan_->group_rows, width}); };
    const auto inward = [&](int64_t first, int64_t step) {
      const Tensor block = scratch();
      double* v = block.mutable_data_ptr<double>();
      for (int64_t r = first; r != p; r += step) {
        if (r != first) couple(transposed, r, r - step, at(r - step), at(r), width);
        std::copy_n(at(r), plan_->size(r) * width, v);
        times_inverse(r, v, at(r), false);
      }
    };
    const auto outward = [&](int64_t, int64_t step) {
      const Tensor block = scratch();
      double* v = block.mutable_data_ptr<double>();
      for (int64_t r = p - step; r >= 0 && r < plan_->groups; r -= step) {
        std::fill_n(v, plan_->size(r) * width, 0.0);
        couple(transposed, r, r + step, at(r + step), v, width);  // v = −U x
        times_inverse(r, v, at(r), true);
      }
    };
    both_ends(inward);
    const Tensor block = scratch();
    double* v = block.mutable_data_ptr<double>();
    if (p > 0) couple(transposed, p, p - 1, at(p - 1), at(p), width);
    if (p + 1 < plan_->groups) couple(transposed, p, p + 1, at(p + 1), at(p), width);
    std::copy_n(at(p), plan_->size(p) * width, v);
    times_inverse(p, v, at(p), false);
    both_ends(outward);
  }

  // work(first, count, width) for panels of columns [first, first + count), padded to `width`, on all threads.
  template <class Work>
  static void over_panels(int64_t B, const Work& work) {
    if (B == 0) return;
    const int64_t share = padded((B + at::get_num_threads() - 1) / at::get_num_threads());
    const int64_t width = std::min(share, kPanel), panels = (B + width - 1) / width;
    const auto one = [&](int64_t i) { work(i * width, std::min(width, B - i * width), width); };
    if (panels == 1) return one(0);  // leaves the threads to both ends
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) one(i);
    });
  }

  // One panel of `solve`.
  template <class scalar_t>
  struct Panel {
    const BlockLU& lu;
    const BlockPlan& plan;
    const PositionScales& scales;
    const scalar_t* x;  // its rows
    int64_t first, count, width;

    void solve(double rtol, double atol, Solution& out, std::vector<std::vector<double>>& history) {
      const Tensor memory = doubles({2, plan.n, width});
      double *r = memory.mutable_data_ptr<double>(), *z = nullptr;
      std::vector<double> norm = residual(nullptr, r), size = norms_of_x(), target(width, 0);
      std::vector<int64_t> active(width, 0), steps(width, 0);
      for (int64_t b = 0; b < count; ++b) {
        if (size[b] == 0) size[b] = norm[b];
        target[b] = std::isfinite(size[b]) ? std::max(rtol * size[b], atol) : std::nan("");  // NaN is never met
        active[b] = norm[b] > target[b];
        history[first + b].push_back(relative(norm[b], size[b]));
      }
      bool more = std::any_of(active.begin(), active.end(), [](int64_t a) { return a != 0; });
      if (!more) std::fill_n(z = r, plan.n * width, 0.0);
      for (bool fresh = true; more; fresh = false) {
        if (!fresh) residual(z, r);
        lu.sweeps(r, width, false);
        double* sum = fresh ? r : z;
        for (int64_t p = 0; p < plan.n; ++p)
          loops().advance(fresh ? nullptr : z + p * width, r + p * width, active.data(),
                          std::is_same_v<scalar_t, float>, sum + p * width, width);
        if (fresh) z = r, r = memory.mutable_data_ptr<double>() + plan.n * width;
        const std::vector<double> now = residual(z, nullptr);
        more = false;
        for (int64_t b = 0; b < count; ++b) {
          if (!active[b]) continue;
          const bool fast = now[b] * kGain < norm[b];
          norm[b] = now[b], ++steps[b];
          history[first + b].push_back(relative(now[b], size[b]));
          active[b] = now[b] > target[b] && fast;
          more |= active[b] != 0;
        }
      }
      loops().template store<scalar_t>()(z, plan.n, width, plan.order.data(),
                                         out.z.mutable_data_ptr<scalar_t>() + first * plan.n, plan.n, count);
      for (int64_t b = 0; b < count; ++b) {
        out.residual.mutable_data_ptr<double>()[first + b] = relative(norm[b], size[b]);
        out.steps.mutable_data_ptr<int64_t>()[first + b] = steps[b];
        out.met.mutable_data_ptr<bool>()[first + b] = norm[b] <= target[b];
      }
    }

    static double relative(double norm, double size) { return size > 0 ? norm / size : norm; }

    std::vector<double> norms_of_x() const {
      std::vector<double> result(width, 0);
      for (int64_t b = 0; b < count; ++b) {
        const scalar_t* v = x + b * plan.n;
        double sums[kLine] = {};
        for (int64_t i = 0; i < plan.n; ++i) sums[i % kLine] += double(v[i]) * double(v[i]);
        result[b] = std::sqrt(std::accumulate(sums, sums + kLine, 0.0));
      }
      return result;
    }

    // ‖x − b̂ − Γ W z‖ of each column; r, where wanted, receives Γ⁻¹ (x − b̂) − W z. No z: zero.
    std::vector<double> residual(const double* z, double* r) const {
      std::vector<double> sums(width, 0);
      const Tensor scratch = r ? Tensor() : doubles({plan.group_rows, width});
      const Rows& rows = plan.matrix;
      for (int64_t group = 0; group < plan.groups; ++group) {
        const int64_t begin = plan.begin(group), size = plan.size(group);
        double* v = r ? r + begin * width : scratch.mutable_data_ptr<double>();
        loops().template load<scalar_t>()(x, plan.n, count, plan.order.data() + begin, scales.offset.data() + begin,
                                          scales.divisor.data() + begin, v, size, width);
        for (int64_t i = 0; i < size; ++i) {
          const int64_t from = rows.begin(begin + i, Rows::lower), to = rows.end(begin + i, Rows::upper);
          if (z)
            loops().subtract_row(lu.matrix_.data() + from, rows.column.data() + from, to - from, z, width,
                                 v + i * width, width);
          const double s = scales.scale[begin + i];
          loops().add_squares(v + i * width, s * s, sums.data(), width);
        }
      }
      for (double& s : sums) s = std::sqrt(s);
      return sums;
    }
  };

  std::shared_ptr<BlockPlan> plan_;
  std::vector<double> matrix_, adjoint_;  // values of the plan's rows
  Tensor inverse_;                        // G: (R, m, padded m)
  bool finite_ = true;
};

}  // namespace

void bind_block_lu(pybind11::module_& m) {
  namespace py = pybind11;
  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<BlockPlan, std::shared_ptr<BlockPlan>>(m, "BlockPlan")
      .def(py::init<const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t, int64_t>(), py::arg("row"),
           py::arg("column"), py::arg("tap"), py::arg("outer"), py::arg("size"), py::arg("inner"), py::arg("rows"),
           no_gil());
  py::class_<BlockLU::Solution>(m, "BlockSolution")
      .def_readonly("z", &BlockLU::Solution::z)
      .def_readonly("residual", &BlockLU::Solution::residual)
      .def_readonly("steps", &BlockLU::Solution::steps)
      .def_readonly("history", &BlockLU::Solution::history)
      .def_readonly("met", &BlockLU::Solution::met)
      .def_readonly("all_met", &BlockLU::Solution::all_met);
  py::class_<BlockLU, LinearMap, std::shared_ptr<BlockLU>>(m, "BlockLU")
      .def(py::init<std::shared_ptr<BlockPlan>, const Tensor&>(), py::arg("plan"), py::arg("weight"), no_gil())
      .def_property_readonly("finite", &BlockLU::finite)
      .def("solve", &BlockLU::solve, py::arg("x"), py::arg("scale"), py::arg("offset"), py::arg("rtol"),
           py::arg("atol"), no_gil());
}

}  // namespace convbn
