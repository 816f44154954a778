// The C interface: chooses the level that this CPU runs, and interprets programs.
//
// A program is a list of calls, each [kernel, number of arguments, arguments...]. It runs in one parallel region, with a
// barrier after each call. One op is a program of one call; a recorded decode step is a program of hundreds.
#include <cstdint>
#include <cstring>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "team.h"

namespace daedal {

#define DAEDAL_TABLE(level) const Entry* table_##level(int* count);
#if defined(NATIVE_HAS_avx512)
DAEDAL_TABLE(avx512)
#endif
#if defined(NATIVE_HAS_avx2)
DAEDAL_TABLE(avx2)
#endif
#if defined(NATIVE_HAS_dotprod)
DAEDAL_TABLE(dotprod)
#endif
DAEDAL_TABLE(generic)

namespace {

struct Level {
    const char* name;
    const Entry* (*table)(int*);
    bool runs;
};

#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi");
}
#endif

#if defined(__aarch64__)
bool runs_dotprod() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // Apple's, all of which have it
#endif
}
#endif

const Level* levels(int* count) {
    static const Level known[] = {
#if defined(NATIVE_HAS_avx512)
        {"avx512", table_avx512, runs_avx512()},
#endif
#if defined(NATIVE_HAS_avx2)
        {"avx2", table_avx2, runs_avx2()},
#endif
#if defined(NATIVE_HAS_dotprod)
        {"dotprod", table_dotprod, runs_dotprod()},
#endif
        {"generic", table_generic, true},
    };
    *count = static_cast<int>(sizeof known / sizeof known[0]);
    return known;
}

const Level* chosen = nullptr;
bool amx_wanted = true;

// Linux gives the matrix unit's registers to a process that asks for them.
bool ask_for_amx() {
#if defined(__linux__) && defined(__x86_64__) && defined(NATIVE_HAS_avx512)
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    const bool tile = edx >> 24 & 1, bf16 = edx >> 22 & 1, int8 = edx >> 25 & 1;
    const long request_permission = 0x1023, tile_data = 18;
    return tile && bf16 && int8 && runs_avx512() && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace

bool has_amx() {
    static const bool granted = ask_for_amx();
    return granted && amx_wanted;
}

}  // namespace daedal

extern "C" {

using daedal::Word;

// Chooses a level by name: "amx" is avx512 with the matrix unit. Null takes the best. 0 where this CPU has it, else 1.
__attribute__((visibility("default"))) int daedal_use(const char* wanted) {
    int count;
    const daedal::Level* known = daedal::levels(&count);
    const bool amx = wanted == nullptr || std::strcmp(wanted, "amx") == 0;
    const char* name = wanted != nullptr && amx ? "avx512" : wanted;
    for (int i = 0; i < count; ++i) {
        if (!known[i].runs || (name != nullptr && std::strcmp(known[i].name, name) != 0)) continue;
        daedal::amx_wanted = amx;
        if (wanted != nullptr && amx && !daedal::has_amx()) return 1;
        daedal::chosen = &known[i];
        return 0;
    }
    return 1;
}

// The level in use, as `daedal_use` names it.
__attribute__((visibility("default"))) const char* daedal_level() {
    if (daedal::chosen == nullptr) daedal_use(nullptr);
    return std::strcmp(daedal::chosen->name, "avx512") == 0 && daedal::has_amx() ? "amx" : daedal::chosen->name;
}

// The name of kernel `index`; null behind the last. All levels have the same kernels in the same order.
__attribute__((visibility("default"))) const char* daedal_kernel(int index) {
    int count;
    const daedal::Entry* table = daedal::table_generic(&count);
    return index < count ? table[index].name : nullptr;
}

__attribute__((visibility("default"))) void daedal_run(const Word* program, Word words, int threads) {
    if (daedal::chosen == nullptr) daedal_use(nullptr);
    daedal::has_amx();
    int count;
    const daedal::Entry* table = daedal::chosen->table(&count);
    daedal::Barrier barrier;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const daedal::Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
#else
    {
        const daedal::Team team{0, 1, &barrier};
#endif
        for (const Word* call = program; call < program + words; call += 2 + call[1]) {
            table[call[0]].run(call + 2, team);
            team.sync();
        }
    }
}
}
