// What a buffer of bounded capacity holds of the fresh rows so far: a function of their number.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "hash.hpp"

namespace mer {

// How many rows the buffer holds: of all tasks together, or of each task (`by_task`).
struct BufferSpec {
    std::vector<i64> capacities;
    bool by_task = false;

    bool given() const { return !capacities.empty(); }
    i64 group_of(i64 task) const { return by_task ? task : 0; }

    void check() const {
        i64 total = 0;
        for (const i64 capacity : capacities) {
            total += capacity;
            if (capacity < 1 || total > std::numeric_limits<std::int32_t>::max()) {
                throw std::invalid_argument(
                    "a buffer holds at least 1 row a task and at most 2^31 - 1 in all, not " +
                    std::to_string(capacity));
            }
        }
    }
};

// One reservoir a group (Algorithm R: Vitter, "Random sampling with a reservoir", ACM TOMS 11 (1),
// 1985), whose random numbers are keyed by the group and by how many rows entered before. So after
// n rows each of them is kept with probability capacity / n, and every rank has the same table.
//
// Slots count through all groups. A row is known by its live index. Of the rows that a group holds
// some may be replayed and some not (those of the entry in training): `may_replay` decides when a
// span begins, and `enter` says it of each later row.
class Reservoirs {
  public:
    static constexpr i64 kNone = -1;

    Reservoirs() = default;
    Reservoirs(u64 seed, const BufferSpec& spec) : seed_(seed) {
        spec.check();
        i64 first = 0;
        for (const i64 capacity : spec.capacities) {
            groups_.push_back({first, capacity});
            first += capacity;
        }
        table_.assign(static_cast<std::size_t>(first), kNone);
        place_.assign(static_cast<std::size_t>(first), kNone);
    }

    i64 num_slots() const { return static_cast<i64>(table_.size()); }

    // The live index of the row in a slot, or kNone.
    i64 row_in(i64 slot) const { return table_[slot]; }

    // A row comes: the slot that it takes, whose earlier row is gone, or kNone.
    i64 enter(i64 group, i64 live, bool replayable) {
        Group& one = groups_[group];
        const i64 before = one.entered++;
        i64 slot = before;
        if (before >= one.capacity) {
            const u64 hash = keyed_hash(seed_, Domain::reservoir, group, before);
            slot = static_cast<i64>(scale_to(hash, static_cast<u64>(before) + 1));
            if (slot >= one.capacity) return kNone;
        }
        slot += one.first;
        table_[slot] = live;
        if (replayable != (place_[slot] != kNone)) replayable ? add(one, slot) : remove(one, slot);
        return slot;
    }

    // Decides anew which rows may be replayed, from `may_replay(live)`.
    template <class Predicate>
    void begin(const Predicate& may_replay) {
        for (Group& one : groups_) {
            one.drawn.clear();
            for (i64 slot = one.first; slot < one.first + one.capacity; ++slot) {
                place_[slot] = kNone;
                if (table_[slot] != kNone && may_replay(table_[slot])) add(one, slot);
            }
        }
    }

    // Empties the slots of the rows for which `is_gone(live)`; calls `emptied(slot)` for each. A
    // later row that takes such a slot fills it again.
    template <class Predicate, class Sink>
    void drop(const Predicate& is_gone, const Sink& emptied) {
        for (Group& one : groups_) {
            for (i64 slot = one.first; slot < one.first + one.capacity; ++slot) {
                if (table_[slot] == kNone || !is_gone(table_[slot])) continue;
                table_[slot] = kNone;
                if (place_[slot] != kNone) remove(one, slot);
                emptied(slot);
            }
        }
    }

    // A uniform draw over the slots of a group whose rows may be replayed; kNone if there is none.
    i64 draw(i64 group, u64 hash) const {
        const std::vector<std::int32_t>& slots = groups_[group].drawn;
        return slots.empty() ? kNone : slots[scale_to(hash, slots.size())];
    }

  private:
    struct Group {
        i64 first;  // slot
        i64 capacity;
        i64 entered = 0;
        std::vector<std::int32_t> drawn{};  // slots that may be replayed
    };

    void add(Group& group, i64 slot) {
        place_[slot] = static_cast<std::int32_t>(group.drawn.size());
        group.drawn.push_back(static_cast<std::int32_t>(slot));
    }

    void remove(Group& group, i64 slot) {
        const std::int32_t last = group.drawn.back();
        group.drawn[place_[slot]] = last;
        place_[last] = place_[slot];
        group.drawn.pop_back();
        place_[slot] = kNone;
    }

    u64 seed_ = 0;
    std::vector<Group> groups_;
    std::vector<i64> table_;           // live index by slot
    std::vector<std::int32_t> place_;  // in the group's `drawn`, by slot
};

}  // namespace mer
