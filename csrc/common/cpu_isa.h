// Run-time choice among the instruction sets that the CPU kernels were compiled for.
#pragma once

namespace grpo_kernels {

enum class CpuIsa { baseline, avx2, avx512 };

// The best one that this processor has. GRPO_KERNELS_ISA=baseline|avx2|avx512, read once, lowers it for tests.
CpuIsa cpu_isa();
const char* cpu_isa_name();

#if defined(GK_X86_ISAS)
#define GK_CALL_CPU(name, args, threads)                            \
  (::grpo_kernels::cpu_isa() == ::grpo_kernels::CpuIsa::avx512      \
       ? ::grpo_kernels::isa_avx512::name##_cpu(args, threads)      \
       : (::grpo_kernels::cpu_isa() == ::grpo_kernels::CpuIsa::avx2 \
              ? ::grpo_kernels::isa_avx2::name##_cpu(args, threads) \
              : ::grpo_kernels::isa_baseline::name##_cpu(args, threads)))
#else
#define GK_CALL_CPU(name, args, threads) ::grpo_kernels::isa_baseline::name##_cpu(args, threads)
#endif

}  // namespace grpo_kernels
