// What every kernel is given: its arguments as 64-bit words, and its place in a team of threads.
//
// A kernel runs on all threads of the team at once and divides the work itself, by rows of its result, so that no sum
// depends on the number of threads. `sync` is a barrier; the interpreter puts one after every kernel. Arguments are
// pointers, integers, or the bits of a double. A kernel allocates nothing: scratch is an argument.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <sched.h>

namespace daedal {

using Word = int64_t;

struct Barrier {
    alignas(64) std::atomic<int> waiting{0};
    alignas(64) std::atomic<int> round{0};
};

struct Range {
    int64_t begin, end;
};

struct Team {
    int rank;
    int size;
    Barrier* barrier;

    // Waits for all. Spins, because the next kernel is microseconds away; gives the core up if another process has it.
    void sync() const {
        if (size == 1) return;
        const int round = barrier->round.load(std::memory_order_acquire);
        if (barrier->waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            barrier->waiting.store(0, std::memory_order_relaxed);
            barrier->round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; barrier->round.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < 1000) {
#if defined(__x86_64__)
                _mm_pause();
#elif defined(__aarch64__)
                __asm__ volatile("isb" ::: "memory");  // `yield` does nothing on most cores
#endif
            } else {
                sched_yield();
            }
        }
    }

    // This thread's share of `count` items, side by side.
    Range share(int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }
};

using Kernel = void (*)(const Word*, const Team&);

struct Entry {
    const char* name;
    Kernel run;
};

template <typename T>
inline T* pointer(Word word) {
    return reinterpret_cast<T*>(word);
}

inline float real(Word word) {
    double value;
    std::memcpy(&value, &word, sizeof value);
    return static_cast<float>(value);
}

// Whether this process may use the matrix unit (AMX), asked once before any kernel runs.
bool has_amx();

}  // namespace daedal
