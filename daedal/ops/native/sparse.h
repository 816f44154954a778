// Attention of all heads on one shared row per key: a window of recent rows, and entries that are chosen or all read
// (V3.2; V4, 2.3). Everything that changes from step to step is read from tensors when the kernel runs.
//
// A query's rows take slots: its window, then its entries. A few queries go through three phases together, each divided
// over all threads, so that one query keeps every thread busy: rows gathered and scored, sixteen slots at a time;
// softmax, heads in lanes; values summed, some columns at a time. The order of every sum follows from a query's own
// slots alone. More slots than fit go in chunks of a fixed size, under a running maximum. Two kinds of arithmetic share
// this shape: bfloat16 pairs, on the matrix unit where there is one, and float32. Included inside each level's
// namespace.
#pragma once

#include "pairs.h"
#include "registers.h"

constexpr float NO_SCORE = std::numeric_limits<float>::lowest();
constexpr int SPARSE_SPLIT = 32;  // columns of the values that one thread sums at once

// Rows of sequences, on pages or side by side: row r of a sequence lies on page table[sequence][r / page_size].
struct RowTable {
    const char* base;  // null: there are none
    const int32_t* table;
    int64_t pages, page_size, page_stride, row_stride;  // pages of one sequence in the table; strides in bytes
    const int32_t* lengths;

    // Row `index` of a sequence; `following`: the rows behind it on its page.
    const char* row(int64_t sequence, int64_t index, int64_t* following = nullptr) const {
        const uint32_t at = static_cast<uint32_t>(index), size = static_cast<uint32_t>(page_size);
        if (following != nullptr) *following = size - 1 - at % size;
        return base + table[sequence * pages + at / size] * page_stride + at % size * row_stride;
    }
};

// Words as `_table` in sparse.py lays them out.
inline RowTable row_table(const Word* a) {
    return {pointer<const char>(a[0]), pointer<const int32_t>(a[1]), a[2], a[3], a[4], a[5],
            pointer<const int32_t>(a[6])};
}

struct Batch {
    const int32_t *starts, *pasts;
    int64_t tokens, sequences;

    int64_t sequence(int64_t token) const {
        int64_t low = 0, high = sequences;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (starts[middle] <= token ? low : high) = middle;
        }
        return low;
    }
    int64_t position(int64_t token, int64_t sequence) const { return pasts[sequence] + token - starts[sequence]; }
    int64_t last(int64_t sequence) const { return pasts[sequence] + starts[sequence + 1] - starts[sequence]; }
};

// What one query reads.
struct SparseQuery {
    int64_t sequence, window_first, window_rows, entries, entries_seen;
    const int64_t* chosen;

    int64_t slots() const { return window_rows + entries; }
};

struct Sparse {
    Batch batch;
    RowTable entries, window;
    PackedForm packed;  // of the entries; a width of 0: they are plain
    int64_t ring;  // rows of a sequence's ring, in which the row of position p lies at p % ring; 0: the window is flat
    const char* q;
    int64_t q_token, q_head;  // strides in bytes
    char* out;
    const void* sinks;
    int64_t sinks_type;
    const int64_t* chosen;
    int64_t width, heads, dim, value_dim, span, rate, chunk, round;
    float scale;
    // Scratch of each query of a round: queries packed [head tiles, dim, 16]; scores [head tiles, chunk, 16]; weights
    // and values as they are multiplied; peak, total and factor [head tiles, 3, 16]; sums [heads, V].
    float* queries;
    float* scores;
    char* weights;
    char* values;
    float* state;
    float* sums;

    int64_t tiles() const { return (heads + 15) / 16; }
    int64_t padded_dim() const { return (dim + 31) / 32 * 32; }
    int64_t padded_values() const { return (value_dim + 31) / 32 * 32; }

    SparseQuery query(int64_t token) const {
        const int64_t sequence = batch.sequence(token), position = batch.position(token, sequence);
        SparseQuery result{sequence, 0, 0, 0, 0, nullptr};
        if (window.base != nullptr) {
            const int64_t origin = ring ? 0 : batch.last(sequence) - window.lengths[sequence];
            result.window_first = std::max<int64_t>(std::max<int64_t>(position - span + 1, origin), 0);
            result.window_rows = std::max<int64_t>(position + 1 - result.window_first, 0);
        }
        if (entries.base == nullptr) return result;
        result.entries_seen = std::min<int64_t>((position + 1) / rate, entries.lengths[sequence]);
        result.entries = result.entries_seen;
        if (chosen == nullptr) return result;
        result.chosen = chosen + token * width;
        for (result.entries = width; result.entries > 0 && result.chosen[result.entries - 1] < 0;) --result.entries;
        return result;
    }

    // How many slots, from the first, hold plain rows.
    int64_t plain(const SparseQuery& query) const { return packed.width == 0 ? query.slots() : query.window_rows; }

    // The row in a slot, null where there is none.
    const char* row(const SparseQuery& query, int64_t slot) const {
        if (slot < query.window_rows) {
            const int64_t position = query.window_first + slot;
            const int64_t origin = batch.last(query.sequence) - (ring ? 0 : window.lengths[query.sequence]);
            return window.row(query.sequence, ring ? position % ring : position - origin);
        }
        int64_t entry = slot - query.window_rows;
        if (entry >= query.entries) return nullptr;
        if (query.chosen != nullptr) entry = query.chosen[entry];
        return entry < 0 || entry >= query.entries_seen ? nullptr : entries.row(query.sequence, entry);
    }
};

// Sixteen numbers of a row of `count`, zero behind its end.
template <typename T>
inline F16 row_part(const T* from, int64_t count) {
    if (count >= 16) return load(from);
    F16 value = fill(0.0f);
    for (int64_t i = 0; i < count; ++i) value[i] = load_one(from + i);
    return value;
}

// Keys and heads whose sums of products are kept in registers together.
#if defined(__AVX512F__)
constexpr int WIDE_KEYS = 16, WIDE_HEADS = 8;
#else
constexpr int WIDE_KEYS = 8, WIDE_HEADS = 4;
#endif

// [padded dim, 16]: head i of a query in lane i.
template <typename T>
inline void pack_wide(const char* q, int64_t head_stride, int64_t heads, int64_t dim, int64_t padded, float* packed) {
    for (int64_t k = 0; k < padded; ++k) {
        F16 lanes = fill(0.0f);
        for (int64_t h = 0; h < heads && k < dim; ++h)
            lanes[h] = load_one(reinterpret_cast<const T*>(q + h * head_stride) + k);
        store(packed + k * 16, lanes);
    }
}

// Sixteen rows in float32, side by side; null for a row of zeros.
template <typename T>
inline void widen_rows(const char* const* rows, int64_t dim, int64_t padded, float* to) {
    for (int key = 0; key < 16; ++key)
        for (int64_t k = 0; k < padded; k += 16) {
            const auto* row = reinterpret_cast<const T*>(rows[key]) + k;
            store(to + key * padded + k, rows[key] == nullptr ? fill(0.0f) : row_part(row, dim - k));
        }
}

// Some rows in one slot after the other; the first `plain` of them are numbers, the others packed.
struct SlotRows {
    const char* rows[16];
    int64_t plain;
    const PackedForm* form;

    bool packed(int i) const { return i >= plain && rows[i] != nullptr; }
};

// products[key][head] of 16 rows and 16 heads.
inline void multiply_wide(const float* rows, const float* packed, int64_t dim, float* products) {
    for (int lane = 0; lane < 16; lane += LANES)
        for (int key = 0; key < 16; key += WIDE_KEYS) {
            Register sums[WIDE_KEYS] = {};
            for (int64_t k = 0; k < dim; ++k) {
                const Register q = take(packed + k * 16 + lane);
                for (int i = 0; i < WIDE_KEYS; ++i) sums[i] += q * rows[(key + i) * dim + k];
            }
            for (int i = 0; i < WIDE_KEYS; ++i) put(products + (key + i) * 16 + lane, sums[i]);
        }
}

// Arithmetic in float32, rows of type T.
template <typename T>
struct WideSparse {
    using Type = T;
    static constexpr int PACKED = 16;  // words of 16 heads' numbers in one column

    static void pack(const Sparse& s, const char* q, int64_t heads, float* packed) {
        pack_wide<T>(q, s.q_head, heads, s.dim, s.padded_dim(), packed);
    }

    static void score(const Sparse& s, const SlotRows& slots, int64_t slot, int64_t query) {
        const int64_t dim = s.padded_dim();
        float* kept = reinterpret_cast<float*>(s.values) + (query * s.chunk + slot) * dim;
        const char* plain[16];
        for (int i = 0; i < 16; ++i) plain[i] = slots.packed(i) ? nullptr : slots.rows[i];
        widen_rows<T>(plain, s.dim, dim, kept);
        for (int i = 0; i < 16; ++i)
            if (slots.packed(i)) slots.form->unpack(slots.rows[i], kept + i * dim);
        for (int64_t tile = 0; tile < s.tiles(); ++tile) {
            const float* packed = s.queries + (query * s.tiles() + tile) * dim * PACKED;
            float* scores = s.scores + ((query * s.tiles() + tile) * s.chunk + slot) * 16;
            multiply_wide(kept, packed, dim, scores);
        }
    }

    // Weights of a pair of slots: they stay where the scores were. Gives back their sum.
    static F16 weigh(float* scores, char*, int64_t slot, F16 first, F16 second) {
        store(scores + slot * 16, first);
        store(scores + (slot + 1) * 16, second);
        return first + second;
    }

    static void finish_weights(char*, int64_t) {}

    // Columns of the values of 16 heads: result[head][0..31] += weight . value over `slots`.
    static void sum_values(
        const Sparse& s, int64_t query, int64_t tile, int64_t column, int64_t slots, float (*result)[SPARSE_SPLIT]) {
        const int64_t dim = s.padded_dim();
        const float* weights = s.scores + (query * s.tiles() + tile) * s.chunk * 16;
        const float* values = reinterpret_cast<const float*>(s.values) + query * s.chunk * dim + column;
        for (int head = 0; head < 16; head += WIDE_HEADS)
            for (int part = 0; part < SPARSE_SPLIT; part += 2 * LANES) {
                Register sums[WIDE_HEADS][2];
                for (int i = 0; i < WIDE_HEADS; ++i)
                    for (int j = 0; j < 2; ++j) sums[i][j] = take(result[head + i] + part + j * LANES);
                for (int64_t slot = 0; slot < slots; ++slot) {
                    const float* value = values + slot * dim + part;
                    const Register low = take(value), high = take(value + LANES);
                    for (int i = 0; i < WIDE_HEADS; ++i) {
                        sums[i][0] += low * weights[slot * 16 + head + i];
                        sums[i][1] += high * weights[slot * 16 + head + i];
                    }
                }
                for (int i = 0; i < WIDE_HEADS; ++i)
                    for (int j = 0; j < 2; ++j) put(result[head + i] + part + j * LANES, sums[i][j]);
            }
    }

    static void begin() {}
};

#if defined(__AVX512BF16__)
constexpr int64_t PAIRS_DIM = 640;  // the widest row that fits a thread's stack sixteen times

// Arithmetic on pairs of bfloat16. weights: [head tiles, chunk / 32, 16 heads, 32 slots]; values: [V / 16, chunk / 2 +
// 1, 16 columns, 2 slots], one line of memory more than needed so that columns do not share cache sets.
template <bool AMX>
struct PairSparse {
    using Type = bf16;
    static constexpr int PACKED = 8;

    static void begin() {
        if (AMX) use_tiles();
    }

    static void pack(const Sparse& s, const char* q, int64_t heads, float* packed) {
        pack_pairs(q, s.q_head, heads, s.dim, packed);
    }

    static int64_t value_stride(const Sparse& s) { return (s.chunk / 2 + 1) * 32; }

    static void score(const Sparse& s, const SlotRows& slots, int64_t slot, int64_t query) {
        alignas(64) bf16 kept[16][PAIRS_DIM];
        const int64_t dim = s.padded_dim(), stride = value_stride(s);
        bf16* values = reinterpret_cast<bf16*>(s.values) + query * (s.padded_values() / 16) * stride + slot * 16;
        for (int pair = 0; pair < 8; ++pair)
            for (int64_t k = 0; k < dim; k += 32) {
                __m512i two[2];
                for (int i = 0; i < 2; ++i) {
                    two[i] = numbers(slots, 2 * pair + i, k, s.dim);
                    _mm512_store_si512(kept[2 * pair + i] + k, two[i]);
                }
                if (k >= s.padded_values()) continue;
                bf16* to = values + k / 16 * stride + pair * 32;
                _mm512_storeu_si512(to, pair_low(two[0], two[1]));
                _mm512_storeu_si512(to + stride, pair_high(two[0], two[1]));
            }
        const float* packed = s.queries + query * s.tiles() * dim * PACKED;
        float* scores = s.scores + (query * s.tiles() * s.chunk + slot) * 16;
        if (AMX)
            multiply_tiles(kept[0], PAIRS_DIM, packed, dim, s.tiles(), scores, s.chunk * 16);
        else
            multiply_pairs(kept[0], PAIRS_DIM, packed, dim, s.tiles(), scores, s.chunk * 16);
    }

    // Numbers k to k + 31 of a row, zero behind its end.
    static __m512i numbers(const SlotRows& slots, int i, int64_t k, int64_t dim) {
        const char* row = slots.rows[i];
        if (row == nullptr) return _mm512_setzero_si512();
        if (slots.packed(i)) return slots.form->narrow_part(row, k);
        return _mm512_maskz_loadu_epi16(first_lanes(dim - k), reinterpret_cast<const bf16*>(row) + k);
    }

    static F16 weigh(float*, char* weights, int64_t slot, F16 first, F16 second) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
        const __m512i wide_high = _mm512_slli_epi32(high, 16);
        auto* to = reinterpret_cast<bf16*>(weights) + slot / 32 * 512 + slot % 32 * 16;
        _mm512_storeu_si512(to, _mm512_or_si512(low, wide_high));
        return (F16)_mm512_slli_epi32(low, 16) + (F16)wide_high;
    }

    // Of each 32 slots: pairs of all heads become each head's slots side by side.
    static void finish_weights(char* weights, int64_t slots) {
        for (int64_t slot = 0; slot < slots; slot += 32) {
            auto* block = reinterpret_cast<bf16*>(weights) + slot * 16;
            __m512i lanes[16];
            for (int i = 0; i < 16; ++i) lanes[i] = _mm512_loadu_si512(block + i * 32);
            transpose_words(lanes);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(block + i * 32, lanes[i]);
        }
    }

    static void sum_values(
        const Sparse& s, int64_t query, int64_t tile, int64_t column, int64_t slots, float (*result)[SPARSE_SPLIT]) {
        const int64_t stride = value_stride(s);
        const auto* weights = reinterpret_cast<const bf16*>(s.weights) + (query * s.tiles() + tile) * s.chunk * 16;
        const auto* values = reinterpret_cast<const bf16*>(s.values) +
                             (query * (s.padded_values() / 16) + column / 16) * stride;
        if (AMX)
            add_tiles(weights, values, stride, slots, result);
        else
            add_pairs(weights, values, stride, slots, result);
    }
};
#endif

template <typename E>
inline void sparse_pack(const Sparse& s, int64_t first, int64_t count, const Team& team) {
    const Range mine = team.share(count * s.tiles());
    for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t query = item / s.tiles(), head = item % s.tiles() * 16;
        E::pack(s, s.q + (first + query) * s.q_token + head * s.q_head, std::min<int64_t>(16, s.heads - head),
                s.queries + item * s.padded_dim() * E::PACKED);
    }
}

template <typename E>
inline void sparse_score(const Sparse& s, int64_t first, int64_t count, int64_t base, const Team& team) {
    // In turn, because a chunk's last blocks may be empty.
    const int64_t blocks = s.chunk / 16;
    for (int64_t item = team.rank; item < count * blocks; item += team.size) {
        const int64_t query = item / blocks, slot = item % blocks * 16;
        const SparseQuery reads = s.query(first + query);
        const int64_t slots = std::min(s.chunk, reads.slots() - base);
        if (slot >= (slots + 31) / 32 * 32) continue;
        SlotRows here{{}, s.plain(reads) - base - slot, &s.packed};
        for (int key = 0; key < 16; ++key)
            here.rows[key] = slot + key < slots ? s.row(reads, base + slot + key) : nullptr;
        E::score(s, here, slot, query);
        for (int key = 0; key < 16; ++key)
            for (int64_t tile = 0; here.rows[key] == nullptr && tile < s.tiles(); ++tile)
                store(s.scores + ((query * s.tiles() + tile) * s.chunk + slot + key) * 16, fill(NO_SCORE));
    }
}

// The softmax of 16 heads over a chunk, heads in lanes. Slots without a row weigh nothing.
template <typename E>
inline void sparse_weigh(const Sparse& s, int64_t query, int64_t tile, int64_t base, int64_t slots) {
    const int64_t item = query * s.tiles() + tile;
    float* scores = s.scores + item * s.chunk * 16;
    char* weights = s.weights + item * s.chunk * 32;
    float* state = s.state + item * 48;
    F16 old_peak = fill(NO_SCORE), total = fill(0.0f);
    if (base > 0) {
        old_peak = load(state), total = load(state + 16);
    } else if (s.sinks != nullptr) {
        for (int64_t lane = 0; lane < std::min<int64_t>(16, s.heads - tile * 16); ++lane) {
            const int64_t head = tile * 16 + lane;
            old_peak[lane] = s.sinks_type == BFLOAT16 ? widen(static_cast<const bf16*>(s.sinks)[head])
                                                      : static_cast<const float*>(s.sinks)[head];
            total[lane] = 1.0f;
        }
    }
    F16 peak = old_peak;
    for (int64_t slot = 0; slot < slots; ++slot) {
        const F16 score = load(scores + slot * 16);
        peak = max(peak, score <= NO_SCORE ? fill(NO_SCORE) : score * s.scale);
    }
    const F16 factor = exponential(old_peak - peak);
    total *= factor;
    const auto weight = [&](int64_t slot) {
        const F16 score = load(scores + slot * 16);
        return score <= NO_SCORE ? fill(0.0f) : exponential(score * s.scale - peak);
    };
    const int64_t padded = (slots + 31) / 32 * 32;
    for (int64_t slot = 0; slot < padded; slot += 2)
        total += E::weigh(scores, weights, slot, weight(slot), weight(slot + 1));
    E::finish_weights(weights, padded);
    store(state, peak);
    store(state + 16, total);
    store(state + 32, factor);
}

template <typename T>
inline void sparse_write(const Sparse& s, int64_t token, int64_t head, int64_t column, const float* sums, float total) {
    auto* to = reinterpret_cast<T*>(s.out) + (token * s.heads + head) * s.value_dim + column;
    const float share = total > 0.0f || total != total ? 1.0f / total : 0.0f;
    const int64_t count = std::min<int64_t>(SPARSE_SPLIT, s.value_dim - column);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(to + i, load(sums + i) * share);
    for (; i < count; ++i) store_one(to + i, sums[i] * share);
}

// Some columns of the values of 16 heads of a query: summed over a chunk, and written behind the last.
template <typename E>
inline void sparse_sum(
    const Sparse& s, int64_t token, int64_t query, int64_t tile, int64_t column, int64_t base, int64_t slots) {
    alignas(64) float sums[16][SPARSE_SPLIT];
    const int64_t heads = std::min<int64_t>(16, s.heads - tile * 16);
    const float* state = s.state + (query * s.tiles() + tile) * 48;
    float* kept = s.sums + (query * s.tiles() + tile) * 16 * s.padded_values() + column;
    for (int64_t head = 0; head < 16; ++head)
        for (int part = 0; part < SPARSE_SPLIT; part += 16) {
            const F16 before = base == 0 ? fill(0.0f) : load(kept + head * s.padded_values() + part);
            store(sums[head] + part, base == 0 ? before : before * state[32 + head]);
        }
    const int64_t here = std::min(s.chunk, slots - base);
    if (here > 0) E::sum_values(s, query, tile, column, (here + 31) / 32 * 32, sums);
    if (base + s.chunk >= slots) {
        for (int64_t head = 0; head < heads; ++head)
            sparse_write<typename E::Type>(s, token, tile * 16 + head, column, sums[head], state[16 + head]);
        return;
    }
    for (int64_t head = 0; head < 16; ++head)
        std::memcpy(kept + head * s.padded_values(), sums[head], sizeof sums[head]);
}

// Both phases behind the scores, of `count` queries.
template <typename E>
inline void sparse_combine(const Sparse& s, int64_t first, int64_t count, int64_t base, const Team& team) {
    Range mine = team.share(count * s.tiles());
    for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t query = item / s.tiles(), slots = s.query(first + query).slots();
        if (base > 0 && base >= slots) continue;
        sparse_weigh<E>(s, query, item % s.tiles(), base, std::min(s.chunk, slots - base));
    }
    team.sync();
    const int64_t parts = s.padded_values() / SPARSE_SPLIT;
    mine = team.share(count * parts);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t query = item / parts, slots = s.query(first + query).slots();
        if (base > 0 && base >= slots) continue;
        for (int64_t tile = 0; tile < s.tiles(); ++tile)
            sparse_sum<E>(s, first + query, query, tile, item % parts * SPARSE_SPLIT, base, slots);
    }
}

template <typename E>
inline void sparse_run(const Sparse& s, const Team& team) {
    E::begin();
    for (int64_t first = 0; first < s.batch.tokens; first += s.round) {
        const int64_t count = std::min(s.round, s.batch.tokens - first);
        sparse_pack<E>(s, first, count, team);
        int64_t most = 0;
        for (int64_t query = 0; query < count; ++query) most = std::max(most, s.query(first + query).slots());
        for (int64_t base = 0; base == 0 || base < most; base += s.chunk) {
            team.sync();
            sparse_score<E>(s, first, count, base, team);
            team.sync();
            sparse_combine<E>(s, first, count, base, team);
        }
        team.sync();
    }
}

// q, token stride, head stride (bytes), type, starts, pasts (int32), tokens, sequences, heads, K, V, span, rate, scale,
// sinks or null, sinks type, result [T, H, V], chosen or null, its columns, chunk, round, ring, scratch (queries,
// scores, weights, values, state, sums), entries (7 words of a table), window (7 words); of packed entries: numbers
// packed (0: none are), exact
inline void sparse_attention(const Word* a, const Team& team) {
    Sparse s;
    s.q = pointer<const char>(a[0]), s.q_token = a[1], s.q_head = a[2];
    s.batch = {pointer<const int32_t>(a[4]), pointer<const int32_t>(a[5]), a[6], a[7]};
    s.heads = a[8], s.dim = a[9], s.value_dim = a[10], s.span = a[11], s.rate = a[12], s.scale = real(a[13]);
    s.sinks = pointer<const void>(a[14]), s.sinks_type = a[15], s.out = pointer<char>(a[16]);
    s.chosen = pointer<const int64_t>(a[17]), s.width = a[18], s.chunk = a[19], s.round = a[20], s.ring = a[21];
    s.queries = pointer<float>(a[22]), s.scores = pointer<float>(a[23]), s.weights = pointer<char>(a[24]);
    s.values = pointer<char>(a[25]), s.state = pointer<float>(a[26]), s.sums = pointer<float>(a[27]);
    s.entries = row_table(a + 28), s.window = row_table(a + 35);
    s.packed = {a[42], a[43]};
    if (a[3] == FLOAT32) return sparse_run<WideSparse<float>>(s, team);
#if defined(__AVX512BF16__)
    if (s.padded_dim() <= PAIRS_DIM) {
        if (has_amx()) return sparse_run<PairSparse<true>>(s, team);
        return sparse_run<PairSparse<false>>(s, team);
    }
#endif
    sparse_run<WideSparse<bf16>>(s, team);
}

#define DAEDAL_SPARSE_KERNELS {"sparse_attention", sparse_attention},
