// Loops over rows on several threads: those of the OpenMP runtime that is already in the process.
//
// PyTorch brings its own OpenMP runtime. Linking a second one gives a second pool of threads, whose workers spin for
// some milliseconds after each loop on the very cores that PyTorch's next matrix product needs. So nothing is linked:
// the runtime is looked up once, among the loaded libraries, by the entry point that GCC's and LLVM's both export.
// Without one (or where the platform cannot be asked) the loop runs on std::threads, started for the call.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace mmrlhf {

// Calls body(begin, end) on disjoint ranges that cover [0, count), on at most `threads` threads. `body` must not throw.
void parallel_rows(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body);

// Path of the OpenMP runtime in use, or "std::thread".
std::string threads_from();

}  // namespace mmrlhf
