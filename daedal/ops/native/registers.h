// One vector register of floats, as wide as the instruction set has it. Sums of inner loops are kept in these: a wider
// vector type would live in memory wherever the machine has no register for it. Included inside each level's namespace.
#pragma once

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Register __attribute__((vector_size(LANES * 4)));

inline Register take(const float* from) {
    Register value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Register take(const bf16* from) {
    typedef uint16_t Narrow __attribute__((vector_size(LANES * 2)));
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
    Narrow narrow_;
    std::memcpy(&narrow_, from, sizeof narrow_);
    const Bits bits = __builtin_convertvector(narrow_, Bits) << 16;
    Register value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void put(float* to, Register value) { std::memcpy(to, &value, sizeof value); }

// The sum of all lanes, halves added to halves.
inline float total(Register value) {
    float lanes[LANES];
    put(lanes, value);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
