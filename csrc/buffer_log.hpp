// Where the records of a buffer lie: positions in an append-only log of equal segments.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plan.hpp"

namespace mer {

// A row that enters the buffer takes the next position of the log, and is never written over. When
// no more than 5/8 of a full segment are rows that the buffer still holds, these are appended once
// more and the segment is dead: so at most 8/5 of the capacity lie in segments that live. All of it
// follows from the events of the reservoirs, so every rank knows every position without a word.
class BufferLog {
  public:
    // What one advance writes: each position with its row, and where everybody can read the row
    // already (kNone: nowhere yet). Rows that came and went meanwhile are not written.
    struct Writes {
        std::vector<i64> position, source, ordinal, dataset, sample;
    };

    static constexpr i64 kNone = Reservoirs::kNone;

    BufferLog(const Plan& plan, i64 segment_records) : plan_(plan), size_(segment_records) {
        if (segment_records < 1) {
            throw std::invalid_argument("a segment holds at least 1 record, not " +
                                        std::to_string(segment_records));
        }
        position_.assign(static_cast<std::size_t>(plan.num_slots()), kNone);
    }

    i64 batch() const {
        const std::unique_lock lock(mutex_);
        return held_.batch();
    }

    // Positions that were given out so far.
    i64 tail() const {
        const std::unique_lock lock(mutex_);
        return tail_;
    }

    // Segments with rows that the buffer holds, in order.
    std::vector<i64> live_segments() const {
        const std::unique_lock lock(mutex_);
        std::vector<i64> found;
        for (const auto& [number, segment] : segments_) {
            if (segment.live > 0) found.push_back(number);
        }
        return found;
    }

    // Every row that the buffer holds, as if nothing of it were written yet.
    Writes content() const {
        const std::unique_lock lock(mutex_);
        return writes_from(0);
    }

    // The rows of the batches before `batch` enter.
    Writes advance(i64 batch) {
        const std::unique_lock lock(mutex_);
        begun_.push_back({tail_, {}});
        plan_.advance_buffer(held_, batch, Events{*this});
        ends_.push_back({batch, tail_});
        return writes_from(begun_.back().first);
    }

    // All that the batches before `batch` wrote can be read by everybody.
    void settle(i64 batch) {
        const std::unique_lock lock(mutex_);
        while (!ends_.empty() && ends_.front().first <= batch) {
            settled_ = ends_.front().second;
            ends_.pop_front();
            begun_.pop_front();
        }
    }

    // The settled position of the row that a slot holds, or kNone if it is not settled yet.
    i64 find(i64 slot, i64 ordinal) const {
        const std::unique_lock lock(mutex_);
        if (slot < 0 || slot >= static_cast<i64>(position_.size())) {
            throw std::invalid_argument("slot " + std::to_string(slot) + " of " +
                                        std::to_string(position_.size()));
        }
        const i64 live = held_.reservoirs().num_slots() ? held_.reservoirs().row_in(slot) : kNone;
        if (live == kNone || plan_.source_of_live(live, held_.batch())[0] != ordinal) return kNone;
        i64 at = position_[slot];
        return settled_source(at);
    }

    // Where everybody can read the rows now that get these positions, which are not settled yet.
    std::vector<i64> sources(std::vector<i64> positions) const {
        const std::unique_lock lock(mutex_);
        for (i64& at : positions) {
            if (at < settled_ || at >= tail_) {
                throw std::invalid_argument("position " + std::to_string(at) +
                                            " is not one that is being written: those are " +
                                            std::to_string(settled_) + " to " +
                                            std::to_string(tail_ - 1));
            }
            at = settled_source(at);
        }
        return positions;
    }

  private:
    struct Segment {
        std::vector<std::int32_t> slot;  // by place in the segment; kNone: dead
        i64 live = 0;
    };

    // One advance: the log's tail when it began, and the source of each position that it gave out.
    using Begun = std::pair<i64, std::vector<i64>>;

    struct Events {
        BufferLog& log;
        void entered(i64 slot, i64 /* live */) {
            if (slot == kNone) return;
            log.kill(slot);
            log.append(slot, kNone);
            log.compact();
        }
        // Of what was dropped nothing is appended again before the next row enters.
        void emptied(i64 slot) { log.kill(slot); }
    };

    bool is_full(i64 segment) const { return (segment + 1) * size_ <= tail_; }

    void kill(i64 slot) {
        i64& at = position_[slot];
        if (at == kNone) return;
        const i64 number = at / size_;
        Segment& segment = segments_[number];
        segment.slot[at % size_] = static_cast<std::int32_t>(kNone);
        --segment.live;
        at = kNone;
        if (is_full(number)) looked_at_.push_back(number);
    }

    void append(i64 slot, i64 source) {
        const i64 number = tail_ / size_;
        Segment& segment = segments_[number];
        segment.slot.push_back(static_cast<std::int32_t>(slot));
        ++segment.live;
        position_[slot] = tail_++;
        begun_.back().second.push_back(source);
        if (is_full(number)) looked_at_.push_back(number);
    }

    void compact() {
        while (!looked_at_.empty()) {
            const i64 number = looked_at_.front();
            looked_at_.pop_front();
            const auto found = segments_.find(number);
            if (found == segments_.end() || found->second.live * 8 > size_ * 5) continue;
            const std::vector<std::int32_t> slots = std::move(found->second.slot);
            segments_.erase(found);
            for (i64 place = 0; place < size_; ++place) {
                if (slots[place] != kNone) append(slots[place], number * size_ + place);
            }
        }
    }

    i64 source_of(i64 position) const {
        const auto after =
            std::upper_bound(begun_.begin(), begun_.end(), position,
                             [](i64 wanted, const Begun& begun) { return wanted < begun.first; });
        const Begun& begun = *(after - 1);
        return begun.second[position - begun.first];
    }

    i64 settled_source(i64 position) const {
        while (position >= settled_ && position != kNone) position = source_of(position);
        return position;
    }

    // What lies from a position on, each row with the place that it had before.
    Writes writes_from(i64 first) const {
        Writes found;
        for (auto at = segments_.lower_bound(first / size_); at != segments_.end(); ++at) {
            const std::vector<std::int32_t>& slots = at->second.slot;
            for (std::size_t place = 0; place < slots.size(); ++place) {
                const i64 position = at->first * size_ + static_cast<i64>(place);
                if (slots[place] == kNone || position < first) continue;
                const i64 live = held_.reservoirs().row_in(slots[place]);
                const auto [ordinal, dataset, sample] = plan_.source_of_live(live, held_.batch());
                const i64 source = first == 0 ? kNone : settled_source(position);
                found.position.push_back(position);
                found.source.push_back(source);
                found.ordinal.push_back(ordinal);
                found.dataset.push_back(dataset);
                found.sample.push_back(sample);
            }
        }
        return found;
    }

    const Plan& plan_;
    const i64 size_;  // records of a segment
    Held held_;
    std::vector<i64> position_;        // by slot
    std::map<i64, Segment> segments_;  // those that live, and the open one
    std::deque<i64> looked_at_;        // full segments that lost a row, or have just become full
    i64 tail_ = 0;
    i64 settled_ = 0;
    std::deque<Begun> begun_;               // advances that are not settled
    std::deque<std::pair<i64, i64>> ends_;  // their batches, and the log's tail after each
    mutable std::mutex mutex_;
};

}  // namespace mer
