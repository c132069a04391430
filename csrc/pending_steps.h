// Limits of adam_rows_ that the operators of all devices share.
#pragma once

namespace bitnet_ext {

// Steps whose updates of an embedding may wait at once. A lane of a warp looks after a step, and the pointers
// of each travel in the kernel's parameters.
constexpr int kMaxPendingSteps = 16;

}  // namespace bitnet_ext
