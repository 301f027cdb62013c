// What this machine's CPU can do, compared with what an artifact's code needs; its cores and memory.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace amx {

// Features in LLVM's spelling without punctuation ("avx512vnni", "dotprod"); empty if unknown.
std::set<std::string> cpu_features();

// Those of `needed` that `present` lacks. A wrong answer here would be a bare SIGILL later.
std::vector<std::string> missing_features(const std::vector<std::string>& needed,
                                          const std::set<std::string>& present);

std::string machine();            // "x86_64", "aarch64", ...
int physical_cores();             // hyperthreads count once; affinity and cgroup quota respected
long long available_memory();     // bytes that can be allocated without swapping; -1 if unknown
long long resident_memory();      // bytes this process occupies now
long long peak_memory();          // and at most so far
bool huge_pages_granted();        // whether madvise(MADV_HUGEPAGE) has an effect

}  // namespace amx
