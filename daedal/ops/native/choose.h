// Choosing entries: the `count` best of each query's visible entries, by a weighted sum of rectified products (V3.2;
// V4, 2.3). Ties go to the lowest index; what comes back is ascending.
//
// Scores first, block of keys by block for a few queries together, so that one query keeps every thread busy and many
// share the keys that they read; then each query's selection. That looks at the best score of each sixteen only: the
// `count` best lie in sixteens that are themselves among the `count` best, ties aside, so a bound below which nothing
// can be chosen is found from a sixteenth of the numbers, and few entries lie above it. Included inside each level's
// namespace.
#pragma once

#include "sparse.h"

constexpr int64_t CHOOSE_BLOCK = 256;  // keys that one thread scores at once
constexpr int BUCKETS = 2048;          // of a histogram over eleven bits

struct Choose {
    Batch batch;
    RowTable keys;
    const char* q;
    int64_t q_token, q_head;  // strides in bytes
    const float* weights;
    int64_t heads, dim, rate, count, width, capacity, round;
    int64_t* chosen;
    // Scratch of each query of a round: queries packed [head tiles, dim, 16]; weights [head tiles, 16]; scores
    // [capacity]; the best of each sixteen [capacity / 16]; candidates' ranks and their indices [capacity].
    float *queries, *padded_weights, *scores, *best;
    uint32_t* ranks;
    int32_t* indices;

    int64_t tiles() const { return (heads + 15) / 16; }
    int64_t padded_dim() const { return (dim + 31) / 32 * 32; }
    int64_t seen(int64_t token, int64_t sequence) const {
        return std::min<int64_t>((batch.position(token, sequence) + 1) / rate, keys.lengths[sequence]);
    }
};

// A score as a number whose order is the scores': zeros are equal whatever their sign, what is no number comes first.
inline uint32_t rank_of(float score) {
    if (score != score) return ~uint32_t{0};
    uint32_t bits;
    score += 0.0f;
    std::memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The greatest bound that at least `count` of the ranks reach, to `bits` bits (a multiple of 11, or 32); `rank(i)`
// gives rank i. above: how many exceed it.
template <typename F>
inline uint32_t bound_of(const F& rank, int64_t size, int64_t count, int bits, int64_t* above) {
    uint32_t bound = 0, mask = 0;
    *above = 0;
    for (int done = 0; done < bits;) {
        const int width = std::min(11, bits - done), shift = 32 - done - width;
        int32_t buckets[BUCKETS] = {};
        for (int64_t i = 0; i < size; ++i) {
            const uint32_t value = rank(i);
            buckets[value >> shift & (BUCKETS - 1) >> (11 - width)] += (value & mask) == bound;
        }
        int64_t bucket = (int64_t{1} << width) - 1;
        for (; bucket > 0 && *above + buckets[bucket] < count; --bucket) *above += buckets[bucket];
        bound |= static_cast<uint32_t>(bucket) << shift;
        mask |= ((uint32_t{1} << width) - 1) << shift;
        done += width;
    }
    return bound;
}

// The columns of the `count` highest scores of `seen`, ascending.
inline void choose_best(const Choose& c, int64_t query, int64_t seen, int64_t* to) {
    const float* scores = c.scores + query * c.capacity;
    const float* best = c.best + query * (c.capacity / 16);
    uint32_t* ranks = c.ranks + query * c.capacity;
    int32_t* indices = c.indices + query * c.capacity;
    const int64_t count = std::min(c.count, c.width), sets = (seen + 15) / 16;
    if (seen <= count) {
        for (int64_t i = 0; i < c.width; ++i) to[i] = i < seen ? i : -1;
        return;
    }
    uint32_t bound = 0;
    int64_t above = 0, kept = 0;
    if (sets > count) bound = bound_of([&](int64_t i) { return rank_of(best[i]); }, sets, count, 22, &above);
    for (int64_t set = 0; set < sets; ++set) {
        if (rank_of(best[set]) < bound) continue;
        const int64_t end = std::min(set * 16 + 16, seen);
        for (int64_t i = set * 16; i < end; ++i) {
            ranks[kept] = rank_of(scores[i]);
            indices[kept] = static_cast<int32_t>(i);
            kept += ranks[kept] >= bound;
        }
    }
    bound = bound_of([&](int64_t i) { return ranks[i]; }, kept, count, 32, &above);
    int64_t equal = count - above, written = 0;
    for (int64_t i = 0; i < kept; ++i) {
        if (ranks[i] < bound || (ranks[i] == bound && equal-- <= 0)) continue;
        to[written++] = indices[i];
    }
    for (; written < c.width; ++written) to[written] = -1;
}

// One score of each of sixteen keys from [key][head] products of 16 heads: relu, times the head's weight, summed.
inline F16 rectified(const float* products, const float* weights, int64_t tiles, int64_t step) {
    F16 result;
    for (int key = 0; key < 16; ++key) {
        F16 sums = fill(0.0f);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const F16 product = load(products + tile * step + key * 16);
            // Written so that what is no number stays so.
            sums += (product < 0.0f ? fill(0.0f) : product) * load(weights + tile * 16);
        }
        result[key] = sum(sums);
    }
    return result;
}

constexpr int64_t CHOOSE_DIM = 256;   // the widest keys that fit a thread's stack sixteen times
constexpr int64_t CHOOSE_HEADS = 128;  // the most index heads

// Products of sixteen keys with all heads, [head tiles][key][16]; null for a key that is not there.
template <typename T>
struct WideChoose {
    static constexpr int PACKED = 16;

    static void begin() {}

    static void pack(const Choose& c, const char* q, int64_t heads, float* packed) {
        pack_wide<T>(q, c.q_head, heads, c.dim, c.padded_dim(), packed);
    }

    static void multiply(const Choose& c, const char* const* rows, bool, const float* packed, float* products) {
        float kept[16 * CHOOSE_DIM];
        const int64_t dim = c.padded_dim();
        widen_rows<T>(rows, c.dim, dim, kept);
        for (int64_t tile = 0; tile < c.tiles(); ++tile)
            multiply_wide(kept, packed + tile * dim * PACKED, dim, products + tile * 256);
    }
};

#if defined(__AVX512BF16__)
template <bool AMX>
struct PairChoose {
    static constexpr int PACKED = 8;

    static void begin() {
        if (AMX) use_tiles();
    }

    static void pack(const Choose& c, const char* q, int64_t heads, float* packed) {
        pack_pairs(q, c.q_head, heads, c.dim, packed);
    }

    static void multiply(
        const Choose& c, const char* const* rows, bool together, const float* packed, float* products) {
        alignas(64) bf16 kept[16][CHOOSE_DIM];
        const int64_t dim = c.padded_dim();
        const bf16* from = reinterpret_cast<const bf16*>(rows[0]);
        int64_t stride = c.keys.row_stride / 2;
        if (!together || dim != c.dim) {
            for (int key = 0; key < 16; ++key)
                for (int64_t k = 0; k < dim; k += 32) {
                    const auto* row = reinterpret_cast<const bf16*>(rows[key]) + k;
                    _mm512_store_si512(kept[key] + k, rows[key] == nullptr
                                                          ? _mm512_setzero_si512()
                                                          : _mm512_maskz_loadu_epi16(first_lanes(c.dim - k), row));
                }
            from = kept[0], stride = CHOOSE_DIM;
        }
        if (AMX)
            multiply_tiles(from, stride, packed, dim, c.tiles(), products, 256);
        else
            multiply_pairs(from, stride, packed, dim, c.tiles(), products, 256);
    }
};
#endif

// Scores of a block of keys for one query, and the best of each sixteen.
template <typename E>
inline void choose_score(const Choose& c, int64_t query, int64_t sequence, int64_t begin, int64_t end, int64_t seen) {
    const float* packed = c.queries + query * c.tiles() * c.padded_dim() * E::PACKED;
    const float* weights = c.padded_weights + query * c.tiles() * 16;
    alignas(64) float products[CHOOSE_HEADS * 16];
    for (int64_t key = begin; key < end; key += 16) {
        const char* rows[16];
        int64_t following;
        const char* first = c.keys.row(sequence, key, &following);
        const bool together = following >= 15 && key + 16 <= seen;
        for (int64_t i = 0; i < 16; ++i) {
            rows[i] = together ? first + i * c.keys.row_stride : nullptr;
            if (!together && key + i < seen) rows[i] = c.keys.row(sequence, key + i);
        }
        E::multiply(c, rows, together, packed, products);
        F16 scores = rectified(products, weights, c.tiles(), 256);
        for (int64_t i = std::max<int64_t>(seen - key, 0); i < 16; ++i)
            scores[i] = -std::numeric_limits<float>::infinity();
        store(c.scores + query * c.capacity + key, scores);
        float best = scores[0];
        for (int i = 1; i < 16; ++i) best = rank_of(scores[i]) > rank_of(best) ? scores[i] : best;
        c.best[query * (c.capacity / 16) + key / 16] = best;
    }
}

template <typename E>
inline void choose_run(const Choose& c, const Team& team) {
    E::begin();
    const int64_t blocks = (c.capacity + CHOOSE_BLOCK - 1) / CHOOSE_BLOCK;
    for (int64_t start = 0; start < c.batch.tokens; start += c.round) {
        const int64_t count = std::min(c.round, c.batch.tokens - start);
        for (int64_t item = team.rank; item < count * c.tiles(); item += team.size) {
            const int64_t token = start + item / c.tiles(), head = item % c.tiles() * 16;
            const int64_t heads = std::min<int64_t>(16, c.heads - head);
            E::pack(c, c.q + token * c.q_token + head * c.q_head, heads, c.queries + item * c.padded_dim() * E::PACKED);
            store(c.padded_weights + item * 16, row_part(c.weights + token * c.heads + head, heads));
        }
        team.sync();
        // Blocks outside, queries inside: a block of keys is read by all queries while it is near.
        for (int64_t item = team.rank; item < count * blocks; item += team.size) {
            const int64_t query = item % count, begin = item / count * CHOOSE_BLOCK;
            const int64_t sequence = c.batch.sequence(start + query), seen = c.seen(start + query, sequence);
            if (seen <= c.width) continue;
            choose_score<E>(c, query, sequence, begin, std::min(begin + CHOOSE_BLOCK, seen), seen);
        }
        team.sync();
        for (int64_t query = team.rank; query < count; query += team.size) {
            const int64_t seen = c.seen(start + query, c.batch.sequence(start + query));
            choose_best(c, query, seen, c.chosen + (start + query) * c.width);
        }
        team.sync();
    }
}

// q, token stride, head stride (bytes), type, weights [T, I] float32, starts, pasts (int32), tokens, sequences, heads,
// K, rate, count, result [T, width] int64, width, capacity (a multiple of 16), round, scratch (queries, weights,
// scores, best of sixteen, ranks, indices), keys (7 words of a table)
inline void choose_entries(const Word* a, const Team& team) {
    Choose c;
    c.q = pointer<const char>(a[0]), c.q_token = a[1], c.q_head = a[2], c.weights = pointer<const float>(a[4]);
    c.batch = {pointer<const int32_t>(a[5]), pointer<const int32_t>(a[6]), a[7], a[8]};
    c.heads = a[9], c.dim = a[10], c.rate = a[11], c.count = a[12], c.chosen = pointer<int64_t>(a[13]), c.width = a[14];
    c.capacity = a[15], c.round = a[16], c.queries = pointer<float>(a[17]), c.padded_weights = pointer<float>(a[18]);
    c.scores = pointer<float>(a[19]), c.best = pointer<float>(a[20]), c.ranks = pointer<uint32_t>(a[21]);
    c.indices = pointer<int32_t>(a[22]), c.keys = row_table(a + 23);
    if (a[3] == FLOAT32) return choose_run<WideChoose<float>>(c, team);
#if defined(__AVX512BF16__)
    if (has_amx()) return choose_run<PairChoose<true>>(c, team);
    return choose_run<PairChoose<false>>(c, team);
#else
    choose_run<WideChoose<bf16>>(c, team);
#endif
}

#define DAEDAL_CHOOSE_KERNELS {"choose_entries", choose_entries},
