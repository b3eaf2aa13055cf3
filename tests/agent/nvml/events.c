/* Events: XIDs and changed recovery actions, as they are logged. */
#define _GNU_SOURCE
#include "nvml.h"

#include <string.h>
#include <time.h>

#define XID_EVENT 8ULL
#define RECOVERY_EVENT 0x8000ULL
#define EVENTS (XID_EVENT | RECOVERY_EVENT | 1ULL | 2ULL)
#define EVENT_SETS 32

struct event_set {
    int used;
    uint64_t seen;
    uint64_t types[SIM_GPUS];
};
static struct event_set sets[EVENT_SETS];

void forget_event_sets(void) { memset(sets, 0, sizeof sets); }

EXPORT int nvmlDeviceGetSupportedEventTypes(struct handle *h, unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetSupportedEventTypes, h, 0);
    *to = EVENTS;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlEventSetCreate(struct event_set **to)
{
    ENTER(nvmlEventSetCreate, to);
    for (int i = 0; i < EVENT_SETS; i++)
        if (!sets[i].used) {
            sets[i] = (struct event_set){.used = 1, .seen = c.state->event_count};
            *to = &sets[i];
            return leave(&c, SUCCESS);
        }
    return leave(&c, UNKNOWN);
}

EXPORT int nvmlDeviceRegisterEvents(struct handle *h, unsigned long long types, struct event_set *set)
{
    ENTER_ON(nvmlDeviceRegisterEvents, h, 0);
    if (set == NULL || !set->used)
        return leave(&c, INVALID_ARGUMENT);
    if (types & ~EVENTS)
        return leave(&c, NOT_SUPPORTED);
    set->types[c.index] |= types;
    return leave(&c, SUCCESS);
}

struct event_data {
    struct handle *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

/* The next event of this set; GPU_IS_LOST when one of its GPUs is; TIMEOUT when there is none yet. */
static int next_event(struct call *c, struct event_set *set, struct event_data *to)
{
    struct sim_state *s = c->state;
    if (s->event_count > set->seen + SIM_EVENTS)
        set->seen = s->event_count - SIM_EVENTS;   /* too slow: the oldest are gone */
    while (set->seen < s->event_count) {
        const struct sim_event *e = &s->events[set->seen++ % SIM_EVENTS];
        if (e->gpu < 0 || e->gpu >= SIM_GPUS || !(set->types[e->gpu] & e->type))
            continue;
        *to = (struct event_data){&whole[e->gpu], e->type, e->data, e->gpu_instance, e->compute_instance};
        return SUCCESS;
    }
    for (uint32_t i = 0; i < s->gpu_count; i++)
        if (set->types[i] && s->gpus[i].lost)
            return GPU_IS_LOST;
    return TIMEOUT;
}

static int64_t monotonic_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

EXPORT int nvmlEventSetWait_v2(struct event_set *set, struct event_data *to, unsigned timeout_ms)
{
    if (set < sets || set >= sets + EVENT_SETS || !set->used)
        return INVALID_ARGUMENT;
    int64_t until = monotonic_ns() + (int64_t)timeout_ms * 1000000;   /* real time, even on a virtual clock */
    ENTER(nvmlEventSetWait_v2, to);
    for (;;) {
        int result = next_event(&c, set, to);
        int64_t left = until - monotonic_ns();
        if (result != TIMEOUT || left <= 0)
            return leave(&c, result);
        uint32_t seen = c.state->wake;
        leave(&c, SUCCESS);
        sim_wait(c.node, seen, left);
        int error = begin(&c, F_nvmlEventSetWait_v2, NO_GPU);
        if (error != SUCCESS)
            return error;
        c.state->calls[F_nvmlEventSetWait_v2]--;   /* still the same call */
    }
}

EXPORT int nvmlEventSetFree(struct event_set *set)
{
    ENTER(nvmlEventSetFree, set);
    set->used = 0;
    return leave(&c, SUCCESS);
}
