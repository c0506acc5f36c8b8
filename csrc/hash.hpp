// Keyed hashing: every random choice of a plan is a hash of the seed, a domain and a few integers.
#pragma once

#include <cstdint>

namespace mer {

using u64 = std::uint64_t;
using i64 = std::int64_t;
__extension__ typedef unsigned __int128 u128;

// A bijective 64-bit mixer ("moremur" of Pelle Evensen, the shape of MurmurHash3's finaliser with
// constants searched for counters as input, which is what we feed it).
inline u64 mix64(u64 x) {
    x ^= x >> 27;
    x *= 0x3C79AC492BA7B653ULL;
    x ^= x >> 33;
    x *= 0x1C69B3F74AC4AE35ULL;
    x ^= x >> 27;
    return x;
}

// 2^64 divided by the golden ratio: keeps the all-zero input from being a fixed point.
constexpr u64 kGolden = 0x9E3779B97F4A7C15ULL;

// What a hash is for; two uses never share a key.
enum class Domain : u64 { permutation = 1, placement = 2, replay = 3, reservoir = 4, slot = 5 };

template <class... Words>
u64 keyed_hash(u64 seed, Domain domain, Words... words) {
    u64 state = mix64(seed + kGolden);
    const u64 inputs[] = {static_cast<u64>(domain), static_cast<u64>(words)...};
    for (const u64 word : inputs) state = mix64((state ^ word) + kGolden);
    return state;
}

// Maps a uniform 64-bit hash to [0, size). The bias is at most size / 2^64 (Lemire, 2019).
inline u64 scale_to(u64 hash, u64 size) {
    return static_cast<u64>((static_cast<u128>(hash) * size) >> 64);
}

}  // namespace mer
