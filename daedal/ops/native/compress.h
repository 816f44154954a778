// Entries of complete groups of tokens, pooled from projections and written where they are kept; and rows kept in
// rings, where the row of position p lies at p modulo the ring's size (V4, 2.3).
//
// Which tokens complete a group follows from positions that are read when the kernel runs, so a recorded step serves
// every position. Rows of tokens before this batch come from the ring, those of the batch from the projections; the
// batch's own are stored behind a barrier, because they may lie where an older row is still read. Included inside each
// level's namespace.
#pragma once

#include "sparse.h"

constexpr int64_t POOL_DIM = 2048;  // the widest entry that fits a thread's stack

struct Pool {
    Batch batch;
    RowTable entries;
    const float *kv, *gate;
    int64_t kv_stride, gate_stride;
    const float* bias;  // [rate, width]
    const void* weight;
    int64_t weight_type, rate, dim, overlaps;
    float eps;
    const float *cos, *sin;  // [T, pairs]: of the first position of each token's own group
    int64_t pairs;
    float* ring;  // [states, rows, 2, width]: projection and gate, its bias added
    const int32_t* states;
    int64_t ring_rows, entries_type;
    PackedForm packed;  // of entries whose type says so

    int64_t width() const { return overlaps ? 2 * dim : dim; }
    float* kept(int64_t sequence, int64_t position) const {
        return ring + (states[sequence] * ring_rows + position % ring_rows) * 2 * width();
    }
};

// One row of a group, from some column on. bias: null where it is in the gate already.
struct PoolRow {
    const float *kv, *gate, *bias;

    F16 logits(int64_t count) const {
        const F16 value = row_part(gate, count);
        return bias == nullptr ? value : value + row_part(bias, count);
    }
};

inline PoolRow pool_row(const Pool& p, int64_t sequence, int64_t position, int64_t column) {
    const int64_t past = p.batch.pasts[sequence];
    if (position < past) {
        const float* kept = p.kept(sequence, position);
        return {kept + column, kept + p.width() + column, nullptr};
    }
    const int64_t token = p.batch.starts[sequence] + position - past;
    return {p.kv + token * p.kv_stride + column, p.gate + token * p.gate_stride + column,
            p.bias + position % p.rate * p.width() + column};
}

// Sixteen columns of a group's entry, as far as it goes: softmax over its rows, one column in each lane.
inline F16 pool_columns(const Pool& p, int64_t sequence, int64_t first, int64_t column) {
    const bool before = p.overlaps && first > 0;
    const int64_t own = p.overlaps ? p.dim : 0;
    const auto each = [&](const auto& visit) {
        for (int64_t i = before ? -p.rate : 0; i < p.rate; ++i)
            visit(pool_row(p, sequence, first + i, column + (i < 0 ? 0 : own)));
    };
    const int64_t count = p.dim - column;
    F16 peak = fill(NO_SCORE), total_ = fill(0.0f), pooled = fill(0.0f);
    each([&](const PoolRow& row) { peak = max(peak, row.logits(count)); });
    each([&](const PoolRow& row) {
        const F16 weight = exponential(row.logits(count) - peak);
        total_ += weight;
        pooled += weight * row_part(row.kv, count);
    });
    return pooled / total_;
}

inline void pool_finish(const Pool& p, int64_t token, float* entry) {
    if (p.weight_type == BFLOAT16)
        norm_row(entry, static_cast<const bf16*>(p.weight), entry, p.dim, p.eps);
    else
        norm_row(entry, static_cast<const float*>(p.weight), entry, p.dim, p.eps);
    const float *cos = p.cos + token * p.pairs, *sin = p.sin + token * p.pairs;
    float* tail = entry + p.dim - 2 * p.pairs;
    for (int64_t i = 0; i < p.pairs; ++i) {
        const float first = tail[2 * i], second = tail[2 * i + 1];
        tail[2 * i] = first * cos[i] - second * sin[i];
        tail[2 * i + 1] = second * cos[i] + first * sin[i];
    }
}

template <typename T>
inline void pool_write(const Pool& p, const float* entry, T* to) {
    for (int64_t i = 0; i < p.dim; ++i) store_one(to + i, entry[i]);
}

// The entry of the group that this token completes, if it does.
inline void pool_token(const Pool& p, int64_t token) {
    const int64_t sequence = p.batch.sequence(token), position = p.batch.position(token, sequence);
    if ((position + 1) % p.rate != 0) return;
    float entry[POOL_DIM];
    for (int64_t column = 0; column < p.dim; column += 16)
        store(entry + column, pool_columns(p, sequence, position + 1 - p.rate, column));
    pool_finish(p, token, entry);
    char* row = const_cast<char*>(p.entries.row(sequence, position / p.rate));
    if (p.entries_type == PACKED_ROWS)
        pack_row(p.packed, entry, row);
    else if (p.entries_type == BFLOAT16)
        pool_write(p, entry, reinterpret_cast<bf16*>(row));
    else
        pool_write(p, entry, reinterpret_cast<float*>(row));
}

// Stores the token's own row, unless a later one of this batch takes its place.
inline void pool_store(const Pool& p, int64_t token) {
    const int64_t sequence = p.batch.sequence(token), position = p.batch.position(token, sequence);
    if (position < p.batch.last(sequence) - p.ring_rows) return;
    const int64_t width = p.width();
    float* kept = p.kept(sequence, position);
    const float *gate = p.gate + token * p.gate_stride, *bias = p.bias + position % p.rate * width;
    std::memcpy(kept, p.kv + token * p.kv_stride, width * sizeof *kept);
    for (int64_t i = 0; i < width; ++i) kept[width + i] = gate[i] + bias[i];
}

// kv, stride, gate, stride (elements), bias, norm weight, its type, starts, pasts (int32), tokens, sequences, rate,
// dim, overlaps, eps, cos, sin, pairs, ring, states (int32), ring rows, entries' type (PACKED_ROWS: packed), entries
// (7 words of a table), of packed ones: numbers packed, exact
inline void pool_groups(const Word* a, const Team& team) {
    Pool p;
    p.kv = pointer<const float>(a[0]), p.kv_stride = a[1], p.gate = pointer<const float>(a[2]), p.gate_stride = a[3];
    p.bias = pointer<const float>(a[4]), p.weight = pointer<const void>(a[5]), p.weight_type = a[6];
    p.batch = {pointer<const int32_t>(a[7]), pointer<const int32_t>(a[8]), a[9], a[10]};
    p.rate = a[11], p.dim = a[12], p.overlaps = a[13], p.eps = real(a[14]);
    p.cos = pointer<const float>(a[15]), p.sin = pointer<const float>(a[16]), p.pairs = a[17];
    p.ring = pointer<float>(a[18]), p.states = pointer<const int32_t>(a[19]), p.ring_rows = a[20];
    p.entries_type = a[21], p.entries = row_table(a + 22), p.packed = {a[29], a[30]};
    const Range mine = team.share(p.batch.tokens);
    for (int64_t token = mine.begin; token < mine.end; ++token) pool_token(p, token);
    team.sync();
    for (int64_t token = mine.begin; token < mine.end; ++token) pool_store(p, token);
}

// rows, row stride (bytes), bytes of a row, starts, pasts (int32), tokens, sequences, ring, states (int32), ring rows
inline void keep_in_ring(const Word* a, const Team& team) {
    const Batch batch{pointer<const int32_t>(a[3]), pointer<const int32_t>(a[4]), a[5], a[6]};
    const int32_t* states = pointer<const int32_t>(a[8]);
    const Range mine = team.share(batch.tokens);
    for (int64_t token = mine.begin; token < mine.end; ++token) {
        const int64_t sequence = batch.sequence(token), position = batch.position(token, sequence);
        if (position < batch.last(sequence) - a[9]) continue;
        char* to = pointer<char>(a[7]) + (states[sequence] * a[9] + position % a[9]) * a[2];
        std::memcpy(to, pointer<const char>(a[0]) + token * a[1], a[2]);
    }
}

#define DAEDAL_COMPRESS_KERNELS {"pool_groups", pool_groups}, {"keep_in_ring", keep_in_ring},
