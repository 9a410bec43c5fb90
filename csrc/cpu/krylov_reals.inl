// krylov_loops.h in both precisions, for each_isa.inl.
namespace f32 {
using real = float;
#include "krylov_loops.h"
}  // namespace f32
namespace f64 {
using real = double;
#include "krylov_loops.h"
}  // namespace f64
