// The loops for any CPU.
#include "bn_loops.h"

namespace convbn::baseline {
enum { kWordBytes = 16 };
#include "bn_loops.inl"
}  // namespace convbn::baseline

namespace convbn {
const BnLoopTables bn_loops_baseline = baseline::all_tables();
}
