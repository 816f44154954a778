// Plain tensor operations on strided operands, as far as they join the other kernels in a recorded step: conversion and
// copies, arithmetic of two operands, functions of one, maxima of rows. Operands broadcast by strides of 0. Included
// inside each level's namespace.
#pragma once

constexpr int AXES = 5;

inline double read_number(const char* from, int64_t index, int64_t type) {
    switch (type) {
        case FLOAT32: return reinterpret_cast<const float*>(from)[index];
        case BFLOAT16: return widen(reinterpret_cast<const bf16*>(from)[index]);
        case INT64: return static_cast<double>(reinterpret_cast<const int64_t*>(from)[index]);
        case INT32: return reinterpret_cast<const int32_t*>(from)[index];
        default: return reinterpret_cast<const uint8_t*>(from)[index];
    }
}

inline void write_number(char* to, int64_t index, int64_t type, double value) {
    switch (type) {
        case FLOAT32: reinterpret_cast<float*>(to)[index] = static_cast<float>(value); break;
        case BFLOAT16: reinterpret_cast<bf16*>(to)[index] = narrow(static_cast<float>(value)); break;
        case INT64: reinterpret_cast<int64_t*>(to)[index] = static_cast<int64_t>(value); break;
        case INT32: reinterpret_cast<int32_t*>(to)[index] = static_cast<int32_t>(value); break;
        default: reinterpret_cast<uint8_t*>(to)[index] = value != 0;
    }
}

// Where row `row` of all axes but the last begins in an operand with these strides.
inline int64_t row_start(int64_t row, const Word* sizes, const Word* strides) {
    int64_t start = 0;
    for (int axis = AXES - 2; axis >= 0; --axis) {
        start += row % sizes[axis] * strides[axis];
        row /= sizes[axis];
    }
    return start;
}

inline int64_t count_rows(const Word* sizes) {
    int64_t rows = 1;
    for (int axis = 0; axis < AXES - 1; ++axis) rows *= sizes[axis];
    return rows;
}

inline int64_t type_bytes(int64_t type) { return type == INT64 ? 8 : type == BFLOAT16 ? 2 : type == BOOL ? 1 : 4; }

inline bool is_float(int64_t type) { return type == FLOAT32 || type == BFLOAT16; }

inline F16 load_as(const char* from, int64_t index, int64_t type) {
    return type == FLOAT32 ? load(reinterpret_cast<const float*>(from) + index)
                           : load(reinterpret_cast<const bf16*>(from) + index);
}

inline void store_as(char* to, int64_t index, int64_t type, F16 value) {
    if (type == FLOAT32)
        store(reinterpret_cast<float*>(to) + index, value);
    else
        store(reinterpret_cast<bf16*>(to) + index, value);
}

// from, its type, to, its type, sizes [5], strides of `from` [5], strides of `to` [5]
inline void copy(const Word* a, const Team& team) {
    const Word *sizes = a + 4, *in = a + 9, *out = a + 14;
    const int64_t length = sizes[AXES - 1], step_in = in[AXES - 1], step_out = out[AXES - 1];
    const Range mine = team.share(count_rows(sizes));
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const char* from = pointer<const char>(a[0]) + row_start(row, sizes, in) * type_bytes(a[1]);
        char* to = pointer<char>(a[2]) + row_start(row, sizes, out) * type_bytes(a[3]);
        if (a[1] == a[3] && step_in == 1 && step_out == 1) {
            std::memcpy(to, from, length * type_bytes(a[1]));
            continue;
        }
        int64_t i = 0;
        if (is_float(a[1]) && is_float(a[3]) && step_in == 1 && step_out == 1)
            for (; i + 16 <= length; i += 16) store_as(to, i, a[3], load_as(from, i, a[1]));
        for (; i < length; ++i) write_number(to, i * step_out, a[3], read_number(from, i * step_in, a[1]));
    }
}

enum Binary : int { ADD = 0, SUB = 1, MUL = 2, DIV = 3 };

template <typename T>
inline T combine(int64_t operation, T x, T y) {
    return operation == ADD ? x + y : operation == SUB ? x - y : operation == MUL ? x * y : x / y;
}

// operation, x, type, y, type, result, type, sizes [5], strides of x, of y, of the result [5 each]; floating point
inline void binary(const Word* a, const Team& team) {
    const Word *sizes = a + 7, *sx = a + 12, *sy = a + 17, *sr = a + 22;
    const int64_t length = sizes[AXES - 1];
    const bool dense = sx[AXES - 1] == 1 && sy[AXES - 1] == 1 && sr[AXES - 1] == 1;
    const Range mine = team.share(count_rows(sizes));
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const char* x = pointer<const char>(a[1]) + row_start(row, sizes, sx) * type_bytes(a[2]);
        const char* y = pointer<const char>(a[3]) + row_start(row, sizes, sy) * type_bytes(a[4]);
        char* result = pointer<char>(a[5]) + row_start(row, sizes, sr) * type_bytes(a[6]);
        int64_t i = 0;
        if (dense)
            for (; i + 16 <= length; i += 16)
                store_as(result, i, a[6], combine(a[0], load_as(x, i, a[2]), load_as(y, i, a[4])));
        for (; i < length; ++i) {
            const float left = static_cast<float>(read_number(x, i * sx[AXES - 1], a[2]));
            const float right = static_cast<float>(read_number(y, i * sy[AXES - 1], a[4]));
            write_number(result, i * sr[AXES - 1], a[6], combine(a[0], left, right));
        }
    }
}

enum Unary : int { COS = 0, SIN = 1, NEG = 2, SIGMOID_OF = 3 };

// function, x, type, result, type, sizes [5], strides of x, of the result [5 each]
inline void unary(const Word* a, const Team& team) {
    const Word *sizes = a + 5, *sx = a + 10, *sr = a + 15;
    const Range mine = team.share(count_rows(sizes));
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const char* x = pointer<const char>(a[1]) + row_start(row, sizes, sx) * type_bytes(a[2]);
        char* result = pointer<char>(a[3]) + row_start(row, sizes, sr) * type_bytes(a[4]);
        for (int64_t i = 0; i < sizes[AXES - 1]; ++i) {
            const float value = static_cast<float>(read_number(x, i * sx[AXES - 1], a[2]));
            const float found = a[0] == COS   ? std::cos(value)
                                : a[0] == SIN ? std::sin(value)
                                : a[0] == NEG ? -value
                                              : 1.0f / (1.0f + std::exp(-value));
            write_number(result, i * sr[AXES - 1], a[4], found);
        }
    }
}

struct Peak {
    float value;
    int64_t place;

    // Of two equals the first counts, and NaN is above all numbers.
    bool yields_to(const Peak& other) const {
        const bool above = other.value > value || (other.value != other.value && value == value);
        const bool equal = other.value == value || (other.value != other.value && value != value);
        return above || (equal && other.place < place);
    }
};

// The greatest of `row[begin]` up to `row[end]`, of which there is at least one.
inline Peak peak_of(const float* row, int64_t begin, int64_t end) {
    Peak found{row[begin], begin};
    int64_t i = begin;
    if (end - begin >= 16) {
        F16 best = load(row + begin);
        I16 at, steps{};
        for (int lane = 0; lane < 16; ++lane) at[lane] = lane;
        for (const I16 lanes = at; i + 16 <= end; i += 16, steps += 16) {
            const F16 x = load(row + i);
            const I16 above = (x > best) | ((x != x) & (best == best));
            best = above ? x : best;
            at = above ? steps + lanes : at;
        }
        found = {best[0], begin + at[0]};
        for (int lane = 1; lane < 16; ++lane) {
            const Peak other{best[lane], begin + at[lane]};
            if (found.yields_to(other)) found = other;
        }
    }
    for (; i < end; ++i) {
        const Peak other{row[i], i};
        if (found.yields_to(other)) found = other;
    }
    return found;
}

// x float32 [rows, columns], dense, rows, columns, values float32 [rows], places int64 [rows], scratch of 16 bytes for
// each row and thread, threads that it has room for
inline void row_peaks(const Word* a, const Team& team) {
    const int64_t rows = a[1], columns = a[2], threads = std::min({a[6], static_cast<Word>(team.size), columns});
    Peak* parts = pointer<Peak>(a[5]);
    if (team.rank < threads) {
        const int64_t begin = columns * team.rank / threads, end = columns * (team.rank + 1) / threads;
        for (int64_t row = 0; row < rows; ++row)
            parts[row * threads + team.rank] = peak_of(pointer<const float>(a[0]) + row * columns, begin, end);
    }
    team.sync();
    const Range mine = team.share(rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        Peak found = parts[row * threads];
        for (int64_t part = 1; part < threads; ++part)
            if (found.yields_to(parts[row * threads + part])) found = parts[row * threads + part];
        pointer<float>(a[3])[row] = found.value;
        pointer<int64_t>(a[4])[row] = found.place;
    }
}

#define DAEDAL_ELEMENTWISE_KERNELS {"copy", copy}, {"binary", binary}, {"unary", unary}, {"row_peaks", row_peaks},
