// preference on the host: token log-probabilities to the loss and its derivative for every token.
#pragma once

#include "../../kernels/cuda/preference_formulas.cuh"

namespace mmrlhf::cpu {

// As the launcher in kernels/cuda/launch.h, but for scratch, which it makes itself, and which `a` need not have.
void preference(PreferenceArguments a);

}  // namespace mmrlhf::cpu
