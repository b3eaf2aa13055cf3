/* What the parts of the library share: NVML's codes, and how every call begins and ends. */
#ifndef NVML_H
#define NVML_H

#include <stddef.h>

#include "functions.h"
#include "sim.h"

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4,
    NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15,
    ARGUMENT_VERSION_MISMATCH = 25, UNKNOWN = 999,
};
#define EXPORT __attribute__((visibility("default")))
#define NO_GPU (-1)

struct handle {
    int gpu;
    int instance;   /* -1: the whole GPU */
};
extern struct handle whole[SIM_GPUS];
extern struct handle slices[SIM_GPUS][SIM_INSTANCES];

/* A call in progress: between begin and leave its node is locked. */
struct call {
    struct sim_node *node;
    struct sim_state *state;
    struct sim_gpu *gpu;
    int index;
    int instance;
    int dirty;
};

int begin(struct call *c, int function, int gpu);
int begin_on(struct call *c, int function, const struct handle *h, int slice_allowed);
int leave(struct call *c, int result);

#define ENTER(fn, pointer) \
    struct call c; \
    if ((pointer) == NULL) \
        return INVALID_ARGUMENT; \
    int entered = begin(&c, F_##fn, NO_GPU); \
    if (entered != SUCCESS) \
        return entered

#define ENTER_ON(fn, handle, slice_allowed) \
    struct call c; \
    int entered = begin_on(&c, F_##fn, (handle), (slice_allowed)); \
    if (entered != SUCCESS) \
        return entered

struct sim_fault *fault_for(struct sim_state *s, int function, int gpu);
int suffer(struct sim_node *n, struct sim_state *s, int function, int gpu);

/* Whether the caller may set anything. */
int may_write(const struct call *c);

/* Leave with one answer. */
int text(struct call *c, char *to, unsigned length, const char *from);
int number(struct call *c, unsigned *to, unsigned value);

int64_t now(const struct call *c);

/* A new life of the library: no event set of the old one is left. */
void forget_event_sets(void);

#endif
