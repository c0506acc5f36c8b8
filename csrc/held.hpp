// What a buffer holds before each batch: the reservoirs, walked through the plan.
#pragma once

#include <algorithm>
#include <vector>

#include "reservoir.hpp"
#include "schedule.hpp"
#include "skipped.hpp"

namespace mer {

// What decides the content of a buffer.
struct HeldWorld {
    u64 seed;
    const BufferSpec& buffer;
    const Schedule& schedule;
    const SkippedBatches& skipped;
};

// Takes note of nothing; the events that `Held::advance` tells of.
struct Nobody {
    void entered(i64 /* slot, kNone: it took none */, i64 /* live */) {}
    void emptied(i64 /* slot */) {}
};

// The buffer as it stands before a batch, with what the batch may replay of it.
class Held {
  public:
    i64 batch() const { return batch_; }
    const Reservoirs& reservoirs() const { return reservoirs_; }

    // All rows of batches before `batch` enter, those of skipped batches left out; then the span
    // of that batch begins.
    template <class Sink>
    void advance(const HeldWorld& world, i64 batch, Sink&& sink) {
        if (reservoirs_.num_slots() == 0) reservoirs_ = Reservoirs(world.seed, world.buffer);
        for (;; ++batch_) {
            if (batch_ < world.schedule.total_batches()) {
                begin_span(world, sink);
            } else {
                // The last segments may train nothing yet: they begin where the plan ends.
                begin_segments(world, static_cast<i64>(world.schedule.segments().size()) - 1, sink);
            }
            if (batch_ >= batch) return;
            enter_batch(world, sink);
        }
    }

  private:
    template <class Sink>
    void begin_span(const HeldWorld& world, Sink& sink) {
        const Span& span = world.schedule.span_of_batch(batch_);
        const i64 index = &span - world.schedule.spans().data();
        if (index == span_) return;
        span_ = index;
        begin_segments(world, span.segment, sink);
        const bool own = world.schedule.segment_of(span).replay.include_current_task;
        reservoirs_.begin([&](i64 live) {
            const Span& from = span_of(world, live);
            return own || from.spec.trained_before || from.spec.position != span.spec.position;
        });
    }

    template <class Sink>
    void begin_segments(const HeldWorld& world, i64 last, Sink& sink) {
        while (segment_ < last) begin_segment(world, ++segment_, sink);
    }

    // What was dropped goes, then comes what this segment says was trained before it.
    template <class Sink>
    void begin_segment(const HeldWorld& world, i64 segment, Sink& sink) {
        const std::vector<i64>& dropped = world.schedule.segments()[segment].dropped;
        if (!dropped.empty()) {
            const auto is_gone = [&](i64 live) {
                const i64 task = span_of(world, live).spec.task;
                return std::find(dropped.begin(), dropped.end(), task) != dropped.end();
            };
            reservoirs_.drop(is_gone, [&](i64 slot) { sink.emptied(slot); });
        }
        for (const Span& span : world.schedule.spans()) {
            if (!span.spec.trained_before || span.segment != segment) continue;
            const i64 first = span.first_ordinal - world.schedule.spent_before(span, world.skipped);
            enter_rows(world, span, first, span.ordinals, true, sink);
        }
    }

    template <class Sink>
    void enter_batch(const HeldWorld& world, Sink& sink) {
        if (world.skipped.run_from(batch_) > 0) return;
        const Schedule& schedule = world.schedule;
        const Span& span = schedule.span_of_batch(batch_);
        const i64 spent = world.skipped.total_of(world.skipped.count_before(batch_));
        const i64 local = batch_ - span.first_batch;
        const i64 count = schedule.fresh_rows(span, local + 1) - schedule.fresh_rows(span, local);
        const bool own = schedule.segment_of(span).replay.include_current_task;
        enter_rows(world, span, schedule.first_ordinal(batch_) - spent, count, own, sink);
    }

    template <class Sink>
    void enter_rows(const HeldWorld& world, const Span& span, i64 first, i64 count, bool replayable,
                    Sink& sink) {
        const i64 group = world.buffer.group_of(span.spec.task);
        for (i64 live = first; live < first + count; ++live) {
            sink.entered(reservoirs_.enter(group, live, replayable), live);
        }
    }

    const Span& span_of(const HeldWorld& world, i64 live) const {
        const std::size_t skips = world.skipped.count_before(batch_);
        const i64 ordinal = world.skipped.ordinal_of_live(live, skips);
        return world.schedule.spans()[world.schedule.span_of_ordinal(ordinal)];
    }

    i64 batch_ = 0;
    i64 span_ = -1;     // the one that began last
    i64 segment_ = -1;  // likewise
    Reservoirs reservoirs_{};
};

}  // namespace mer
