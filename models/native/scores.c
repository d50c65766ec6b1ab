/* A histogram of scores in [0, 1], see `models.routing`. */

#include "vectors.h"

enum { SCORES = 1 << 14 };

typedef struct {
    double count, sum;
} Bin;

typedef struct {
    const float *score; /* (scores,) */
    int64_t scores;
    int32_t bins, tables;
    Bin *bin;       /* (tables, bins), added to: each thread has a table of its own */
    int64_t next;   /* the next scores that no thread has taken, by SCORES */
    int32_t threads; /* that have a table */
} Histogram;

/* Works on scores until all are taken: to be called by each of at most `tables` threads. */
void pcsr_histogram_work(void *argument) {
    Histogram *job = argument;
    const int32_t table = __atomic_fetch_add(&job->threads, 1, __ATOMIC_RELAXED);
    if (table >= job->tables) return;
    Bin *bins = job->bin + (int64_t)table * job->bins;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED) * SCORES;
        if (first >= job->scores) return;
        const int64_t last = job->scores - first < SCORES ? job->scores : first + SCORES;
        for (int64_t i = first; i < last; i++) {
            const float score = job->score[i], at = score * job->bins;
            /* 1.0 belongs to the last bin; nan, for which no comparison holds, to the first. */
            Bin *bin = &bins[at > 0 ? at < job->bins ? (int32_t)at : job->bins - 1 : 0];
            bin->count += 1;
            bin->sum += score;
        }
    }
}
