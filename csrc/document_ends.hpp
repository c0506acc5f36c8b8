// Where documents end inside ranges of tokens, asked of `.idx` files that are neither mapped nor
// loaded: a file that shrinks meanwhile is an error and not a bus error.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "file_reader.hpp"

namespace mer {

// Document `document` of request `row` ends before sequence `sequence`, at token `end`. That is
// outside of the corpus or before the end of the document ahead of it; `end` is -1 where there is
// no such sequence.
struct DocumentFault : std::runtime_error {
    DocumentFault(i64 row, i64 document, i64 sequence, i64 end)
        : std::runtime_error("damaged document index"),
          row(row),
          document(document),
          sequence(sequence),
          end(end) {}
    std::array<i64, 4> values() const { return {row, document, sequence, end}; }
    i64 row, document, sequence, end;
};

// An open `.idx` file; megatron_mer.data.index_format describes its layout.
struct DocumentTable {
    int descriptor;
    i64 num_sequences;
    i64 num_entries;  // documents + 1
    i64 itemsize;     // bytes of a token
    i64 num_tokens;

    i64 num_documents() const { return num_entries - 1; }
    i64 pointer_byte(i64 sequence) const { return 34 + 4 * num_sequences + 8 * sequence; }
    i64 document_byte(i64 entry) const { return 34 + 12 * num_sequences + 8 * entry; }
};

class DocumentEnds {
  public:
    // Calls found(place) for each token of [start, start + length) that is the last one of a
    // document; place counts from `start`, ascending. `row` names the request in errors.
    template <class Found>
    void find(const DocumentTable& table, i64 start, i64 length, i64 row, const Found& found) {
        const i64 stop = start + length;
        i64 previous = 0;
        for (i64 first = narrowed(table, start, row); first < table.num_documents();
             first += kBlock) {
            load(table, first, std::min(kBlock, table.num_documents() - first), row);
            for (std::size_t i = 0; i < ends_.size(); ++i) {
                const i64 end = ends_[i];
                if (end < previous || end > table.num_tokens) {
                    throw DocumentFault(row, first + static_cast<i64>(i), sequences_[i], end);
                }
                // An empty document repeats the end of the one before.
                if (end > start && end <= stop && end > previous) found(end - 1 - start);
                previous = end;
            }
            if (previous > stop) return;
        }
    }

  private:
    static constexpr i64 kBlock = 128;  // documents that are read together

    // A document of which at most kBlock ones on the first lies that ends after `token`. Requests
    // mostly come sorted by file and token: the search then widens from where the last one stood.
    i64 narrowed(const DocumentTable& table, i64 token, i64 row) {
        const bool goes_on = table.descriptor == last_descriptor_ && token >= last_token_;
        i64 low = goes_on ? last_low_ : 0, high = table.num_documents();
        for (i64 step = kBlock; goes_on && low + step < high; step *= 2) {
            if (end_of(table, low + step, row) > token) {
                high = low + step;
            } else {
                low += step;
            }
        }
        while (high - low > kBlock) {
            const i64 middle = low + (high - low) / 2;
            (end_of(table, middle, row) <= token ? low : high) = middle;
        }
        last_descriptor_ = table.descriptor;
        last_token_ = token;
        last_low_ = low;
        return low;
    }

    i64 end_of(const DocumentTable& table, i64 document, i64 row) {
        load(table, document, 1, row);
        return ends_[0];
    }

    // Reads where `count` documents end: before which sequence, and at which token that one starts.
    void load(const DocumentTable& table, i64 first, i64 count, i64 row) {
        const std::size_t size = static_cast<std::size_t>(count);
        sequences_.resize(size);
        ends_.resize(size);
        read_exactly(table.descriptor, sequences_.data(), 8 * count, table.document_byte(first + 1),
                     row);
        for (std::size_t i = 0; i < size; ++i) {
            const i64 sequence = sequences_[i];
            if (sequence < 0 || sequence > table.num_sequences) {
                throw DocumentFault(row, first + static_cast<i64>(i), sequence, -1);
            }
        }
        // Documents are mostly one sequence each: their pointers are then one read.
        const auto [low, high] = std::minmax_element(sequences_.begin(), sequences_.end());
        const i64 begin = *low, span = std::min(*high + 1, table.num_sequences) - begin;
        const bool dense = span <= 4 * count;
        if (dense) read_pointers(table, begin, span, row);
        for (std::size_t i = 0; i < size; ++i) {
            const i64 sequence = sequences_[i];
            if (sequence == table.num_sequences) {
                ends_[i] = table.num_tokens;
                continue;
            }
            if (!dense) read_pointers(table, sequence, 1, row);
            const i64 place = dense ? sequence - begin : 0;
            ends_[i] = pointers_[static_cast<std::size_t>(place)] / table.itemsize;
        }
    }

    void read_pointers(const DocumentTable& table, i64 first, i64 count, i64 row) {
        pointers_.resize(static_cast<std::size_t>(count));
        read_exactly(table.descriptor, pointers_.data(), 8 * count, table.pointer_byte(first), row);
    }

    std::vector<i64> sequences_, ends_, pointers_;
    int last_descriptor_ = -1;
    i64 last_token_ = 0, last_low_ = 0;
};

}  // namespace mer
