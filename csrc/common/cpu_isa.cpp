#include "common/cpu_isa.h"

#include <cstdlib>
#include <cstring>

namespace grpo_kernels {
namespace {

CpuIsa detect() {
  CpuIsa best = CpuIsa::baseline;
#if defined(GK_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  best = avx512 ? CpuIsa::avx512 : avx2 ? CpuIsa::avx2 : CpuIsa::baseline;
#endif
  const char* wanted = std::getenv("GRPO_KERNELS_ISA");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "baseline") == 0) return CpuIsa::baseline;
  if (std::strcmp(wanted, "avx2") == 0 && best > CpuIsa::avx2) return CpuIsa::avx2;
  return best;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case CpuIsa::avx512:
      return "avx512";
    case CpuIsa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace grpo_kernels
