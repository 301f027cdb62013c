#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <sched.h>
#include <sys/auxv.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <fstream>
#include <map>
#include <sstream>

namespace amx {
namespace {

// Linux's flag -> LLVM's feature, where removing punctuation is not enough.
const std::map<std::string, std::string> kAliases = {
    {"pni", "sse3"},       {"abm", "lzcnt"},       {"bmi1", "bmi"},        {"shani", "sha"},
    {"rdrand", "rdrnd"},   {"pclmulqdq", "pclmul"}, {"asimd", "neon"},     {"asimddp", "dotprod"},
    {"asimdhp", "fullfp16"}, {"atomics", "lse"},   {"asimdrdm", "rdm"},    {"pmull", "aes"},
};

std::string normalize(const std::string& name) {
  std::string plain;
  for (char c : name) {
    if (std::isalnum(static_cast<unsigned char>(c))) plain += char(std::tolower(c));
  }
  auto found = kAliases.find(plain);
  return found == kAliases.end() ? plain : found->second;
}

// Bits of Linux's arch/arm64 hwcap.h. /proc/cpuinfo would show the host's CPU under emulation.
std::set<std::string> arm_features() {
  struct Bit {
    unsigned long entry;
    int bit;
    const char* name;
  };
  static const Bit bits[] = {
      {AT_HWCAP, 0, "fparmv8"},   {AT_HWCAP, 1, "neon"},   {AT_HWCAP, 3, "aes"},
      {AT_HWCAP, 6, "sha2"},      {AT_HWCAP, 7, "crc"},    {AT_HWCAP, 8, "lse"},
      {AT_HWCAP, 10, "fullfp16"}, {AT_HWCAP, 12, "rdm"},   {AT_HWCAP, 17, "sha3"},
      {AT_HWCAP, 20, "dotprod"},  {AT_HWCAP, 22, "sve"},   {AT_HWCAP, 23, "fp16fml"},
      {AT_HWCAP2, 1, "sve2"},     {AT_HWCAP2, 13, "i8mm"}, {AT_HWCAP2, 14, "bf16"},
  };
  std::set<std::string> found;
  for (const Bit& b : bits) {
    if (getauxval(b.entry) >> b.bit & 1) found.insert(b.name);
  }
  return found;
}

#if defined(__x86_64__)
// Bits of the CPUID instruction (Intel SDM, volume 2). /proc/cpuinfo says what the kernel lets
// programs use, but shows the host's CPU under emulation; a feature must be in both.
std::set<std::string> denied_by_cpuid() {
  enum Register { kEax, kEbx, kEcx, kEdx };
  struct Bit {
    unsigned leaf, sub;
    Register where;
    int bit;
    const char* name;
  };
  static const Bit bits[] = {
      {1, 0, kEcx, 0, "sse3"},       {1, 0, kEcx, 9, "ssse3"},      {1, 0, kEcx, 12, "fma"},
      {1, 0, kEcx, 19, "sse41"},     {1, 0, kEcx, 20, "sse42"},     {1, 0, kEcx, 22, "movbe"},
      {1, 0, kEcx, 23, "popcnt"},    {1, 0, kEcx, 28, "avx"},       {1, 0, kEcx, 29, "f16c"},
      {7, 0, kEbx, 3, "bmi"},        {7, 0, kEbx, 5, "avx2"},       {7, 0, kEbx, 8, "bmi2"},
      {7, 0, kEbx, 16, "avx512f"},   {7, 0, kEbx, 17, "avx512dq"},  {7, 0, kEbx, 21, "avx512ifma"},
      {7, 0, kEbx, 28, "avx512cd"},  {7, 0, kEbx, 30, "avx512bw"},  {7, 0, kEbx, 31, "avx512vl"},
      {7, 0, kEcx, 1, "avx512vbmi"}, {7, 0, kEcx, 6, "avx512vbmi2"}, {7, 0, kEcx, 8, "gfni"},
      {7, 0, kEcx, 11, "avx512vnni"}, {7, 0, kEcx, 12, "avx512bitalg"},
      {7, 0, kEcx, 14, "avx512vpopcntdq"}, {7, 0, kEdx, 23, "avx512fp16"},
      {0x80000001, 0, kEcx, 5, "lzcnt"}, {7, 1, kEax, 4, "avxvnni"}, {7, 1, kEax, 5, "avx512bf16"},
      {7, 1, kEdx, 4, "avxvnniint8"},
  };
  std::set<std::string> denied;
  for (const Bit& b : bits) {
    unsigned word[4] = {};
    bool known = __get_cpuid_count(b.leaf, b.sub, &word[0], &word[1], &word[2], &word[3]);
    if (!known || !(word[b.where] >> b.bit & 1)) denied.insert(b.name);
  }
  return denied;
}
#else
std::set<std::string> denied_by_cpuid() { return {}; }
#endif

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

std::string machine() {
  utsname names;
  uname(&names);
  return names.machine;
}

std::set<std::string> cpu_features() {
  if (machine() == "aarch64") return arm_features();
  std::set<std::string> found;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("isa", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) found.insert(normalize(word));
    break;
  }
  for (const std::string& name : denied_by_cpuid()) found.erase(name);
  return found;
}

std::vector<std::string> missing_features(const std::vector<std::string>& needed,
                                          const std::set<std::string>& present) {
  static const std::set<std::string> unreported = {"64bit", "x87", "crc32", "evex512"};
  static const char* tuning[] = {"fast",   "slow", "false",       "tuning", "use",
                                 "prefer", "idiv", "macrofusion", "branch"};
  std::vector<std::string> missing;
  if (present.empty()) return missing;
  for (const std::string& name : needed) {
    std::string plain = normalize(name);
    bool hint = name[0] == '-' || unreported.count(plain);
    for (const char* prefix : tuning) hint = hint || plain.rfind(prefix, 0) == 0;
    if (!hint && !present.count(plain)) missing.push_back(name[0] == '+' ? name.substr(1) : name);
  }
  return missing;
}

int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::string line = first_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                  "/topology/thread_siblings_list");
    cores.insert(line.empty() ? std::to_string(cpu) : line);
  }
  int count = static_cast<int>(cores.size());
  std::istringstream quota(first_line("/sys/fs/cgroup/cpu.max"));
  long long limit, period;
  if (quota >> limit >> period && period > 0) {
    count = std::min<long long>(count, std::max<long long>(1, limit / period));
  }
  return std::max(1, count);
}

long long available_memory() {
  std::ifstream file("/proc/meminfo");
  long long available = -1;
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) available = std::stoll(line.substr(13)) * 1024;
  }
  std::string limit = first_line("/sys/fs/cgroup/memory.max");
  std::string used = first_line("/sys/fs/cgroup/memory.current");
  if (available >= 0 && !limit.empty() && limit != "max" && !used.empty()) {
    available = std::min(available, std::max(0LL, std::stoll(limit) - std::stoll(used)));
  }
  return available;
}

long long resident_memory() {
  std::ifstream file("/proc/self/statm");
  long long size = 0, pages = 0;
  file >> size >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

long long peak_memory() {
  // Not getrusage(): its maximum is inherited from the process that started this one.
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  }
  rusage usage;  // an emulator's /proc may lack it
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024LL;
}

bool huge_pages_granted() {
  std::string line = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  return !line.empty() && line.find("[never]") == std::string::npos;
}

}  // namespace amx
