// Batches whose update was not applied, and the fresh ordinals that they spent.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "hash.hpp"

namespace mer {

class SkippedBatches {
  public:
    struct Interval {
        i64 batch;
        i64 first;   // ordinal
        i64 length;  // in ordinals; 0 for a batch of replay rows only
        i64 before;  // ordinals in all earlier intervals
    };

    void add(i64 batch, i64 first, i64 length) {
        if (!intervals_.empty() && batch <= intervals_.back().batch) {
            throw std::invalid_argument(
                "batch " + std::to_string(batch) + " cannot be marked skipped after batch " +
                std::to_string(intervals_.back().batch) + ": marks must come in increasing order");
        }
        intervals_.push_back({batch, first, length, total_of(intervals_.size())});
    }

    const std::vector<Interval>& intervals() const { return intervals_; }

    // How many skipped batches come before `batch`.
    std::size_t count_before(i64 batch) const {
        const auto found =
            std::lower_bound(intervals_.begin(), intervals_.end(), batch,
                             [](const Interval& one, i64 value) { return one.batch < value; });
        return static_cast<std::size_t>(found - intervals_.begin());
    }

    // How many ordinals the first `count` skipped batches spent.
    i64 total_of(std::size_t count) const {
        return count == 0 ? 0 : intervals_[count - 1].before + intervals_[count - 1].length;
    }

    // How many of the batches first, first + 1, ... are skipped without a gap.
    i64 run_from(i64 first) const {
        i64 length = 0;
        for (std::size_t i = count_before(first);
             i < intervals_.size() && intervals_[i].batch == first + length; ++i) {
            ++length;
        }
        return length;
    }

    // The ordinal with `live` ordinals before it that none of the first `count` intervals holds.
    i64 ordinal_of_live(i64 live, std::size_t count) const {
        const auto end = intervals_.begin() + static_cast<std::ptrdiff_t>(count);
        const auto found = std::upper_bound(
            intervals_.begin(), end, live,
            [](i64 value, const Interval& one) { return value < one.first - one.before; });
        return live + total_of(static_cast<std::size_t>(found - intervals_.begin()));
    }

  private:
    std::vector<Interval> intervals_;
};

}  // namespace mer
