// The replay share as an exact fraction.
#pragma once

#include <stdexcept>
#include <string>

#include "hash.hpp"

namespace mer {

// numerator / denominator in [0, 1). A binary float would lose rows: 0.29 * 100 is below 29.
struct Fraction {
    i64 numerator = 0;
    i64 denominator = 1;

    static constexpr i64 kMaxDenominator = 1'000'000'000'000'000'000;

    void check() const {
        if (denominator < 1 || denominator > kMaxDenominator || numerator < 0 ||
            numerator >= denominator) {
            throw std::invalid_argument(
                "the replay share must be a fraction from 0 to below 1 with a denominator of at "
                "most 10^18, not " +
                std::to_string(numerator) + " / " + std::to_string(denominator));
        }
    }

    // floor(count * numerator / denominator) for 0 <= count <= 2^62.
    i64 floor_of(i64 count) const {
        const u128 product = static_cast<u128>(count) * static_cast<u128>(numerator);
        return static_cast<i64>(product / static_cast<u128>(denominator));
    }
};

}  // namespace mer
