/* The state file and the physics: who may touch it when, and what a GPU draws. No NVML in here. */
#define _GNU_SOURCE
#include "sim.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define POWER_CAP 0x04ULL
#define IDLE 0x01ULL
#define HW_SLOWDOWN 0x08ULL
#define HW_THERMAL 0x40ULL
#define POWER_BRAKE 0x80ULL
#define SECOND 1000000000LL
#define MAX_Q_BIT 2u        /* bit 1 of the profile mask */
#define MAX_Q_SHARE 0.85    /* invented: what MAX_Q leaves of the draw above idle */
#define BRAKE_SHARE 0.5     /* the brake halves the clocks */

struct sim_node {
    struct sim_state *state;
    pthread_mutex_t mutex;   /* flock does not part the threads of one process */
    int fd;
    dev_t device;
    ino_t inode;
};

uint64_t sim_state_size(void) { return sizeof(struct sim_state); }

struct sim_node *sim_open(const char *path)
{
    struct stat st;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    if (fstat(fd, &st) != 0 || (uint64_t)st.st_size < sizeof(struct sim_state))
        goto fail;
    void *at = mmap(NULL, sizeof(struct sim_state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        goto fail;
    struct sim_state *state = at;
    if (state->magic != SIM_MAGIC || state->layout != SIM_LAYOUT) {
        munmap(at, sizeof(struct sim_state));
        errno = EPROTO;
        goto fail;
    }
    struct sim_node *node = calloc(1, sizeof *node);
    if (node == NULL) {
        munmap(at, sizeof(struct sim_state));
        goto fail;
    }
    node->state = state;
    node->fd = fd;
    node->device = st.st_dev;
    node->inode = st.st_ino;
    pthread_mutex_init(&node->mutex, NULL);
    return node;
fail:
    close(fd);
    return NULL;
}

int sim_is(const struct sim_node *node, const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && st.st_dev == node->device && st.st_ino == node->inode;
}

void sim_close(struct sim_node *node)
{
    munmap(node->state, sizeof(struct sim_state));
    close(node->fd);
    pthread_mutex_destroy(&node->mutex);
    free(node);
}

int64_t sim_now(const struct sim_state *state)
{
    struct timespec ts;
    if (state->clock_virtual)
        return state->virtual_ns;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * SECOND + ts.tv_nsec;
}

/* ---- what a GPU draws ---- */

uint32_t sim_enforced_mw(const struct sim_gpu *gpu)
{
    if (gpu->out_of_band_mw != 0 && gpu->out_of_band_mw < gpu->requested_mw)
        return gpu->out_of_band_mw;
    return gpu->requested_mw;
}

static double tau(const struct sim_gpu *gpu) { return gpu->tau_seconds > 1e-6 ? gpu->tau_seconds : 1e-6; }

static const struct sim_segment *segment_at(const struct sim_gpu *gpu, int64_t ns)
{
    uint64_t kept = gpu->segment_count < SIM_SEGMENTS ? gpu->segment_count : SIM_SEGMENTS;
    const struct sim_segment *found = NULL;
    for (uint64_t back = 1; back <= kept; back++) {
        found = &gpu->segments[(gpu->segment_count - back) % SIM_SEGMENTS];
        if (found->start_ns <= ns)
            return found;
    }
    return found;   /* older than what is kept: the oldest */
}

static double seconds_into(const struct sim_segment *segment, int64_t ns)
{
    return ns > segment->start_ns ? (double)(ns - segment->start_ns) / 1e9 : 0.0;
}

double sim_power_watts(const struct sim_gpu *gpu, int64_t ns)
{
    const struct sim_segment *s = segment_at(gpu, ns);
    if (s == NULL)
        return gpu->idle_watts;
    return s->target_watts + (s->start_watts - s->target_watts) * exp(-seconds_into(s, ns) / tau(gpu));
}

double sim_energy_joules(const struct sim_gpu *gpu, int64_t ns)
{
    const struct sim_segment *s = segment_at(gpu, ns);
    if (s == NULL)
        return 0.0;
    double t = seconds_into(s, ns);
    double lag = (s->start_watts - s->target_watts) * tau(gpu) * (1.0 - exp(-t / tau(gpu)));
    return s->start_joules + s->target_watts * t + lag;
}

/* The mean over the last second, as Ampere and later report power. */
double sim_average_watts(const struct sim_gpu *gpu, int64_t now)
{
    uint64_t kept = gpu->segment_count < SIM_SEGMENTS ? gpu->segment_count : SIM_SEGMENTS;
    if (kept == 0)
        return gpu->idle_watts;
    int64_t first = gpu->segments[(gpu->segment_count - kept) % SIM_SEGMENTS].start_ns;
    int64_t from = now - SECOND > first ? now - SECOND : first;
    if (now - from < 1000000)
        return sim_power_watts(gpu, now);
    return (sim_energy_joules(gpu, now) - sim_energy_joules(gpu, from)) / ((double)(now - from) / 1e9);
}

double sim_celsius(const struct sim_gpu *gpu, int64_t now)
{
    if (gpu->forced_celsius >= 0)
        return gpu->forced_celsius;
    return gpu->ambient_celsius + gpu->celsius_per_watt * sim_power_watts(gpu, now);
}

static double demand_watts(const struct sim_gpu *gpu)
{
    double above = (gpu->demand_watts >= 0 ? gpu->demand_watts
                    : gpu->idle_watts + gpu->load * (gpu->full_watts - gpu->idle_watts)) - gpu->idle_watts;
    if (above < 0)
        above = 0;
    if (gpu->profiles_requested[0] & MAX_Q_BIT)
        above *= MAX_Q_SHARE;
    if (gpu->locked_max_mhz != 0 && gpu->locked_max_mhz < gpu->max_sm_mhz)
        above *= (double)gpu->locked_max_mhz / gpu->max_sm_mhz;
    return gpu->idle_watts + above;
}

/* A module's limit covers its CPU and all its GPUs: what the CPU leaves is shared evenly. */
static double module_share_watts(const struct sim_state *state, const struct sim_gpu *gpu)
{
    uint32_t sharers = 0;
    if (gpu->module_max_mw == 0)
        return INFINITY;
    for (uint32_t i = 0; i < state->gpu_count; i++)
        sharers += state->gpus[i].module == gpu->module;
    return (gpu->module_requested_mw / 1000.0 - gpu->module_other_watts) / sharers;
}

double sim_clock_share(const struct sim_gpu *gpu)
{
    double wanted = demand_watts(gpu) - gpu->idle_watts;
    if (gpu->segment_count == 0 || wanted <= 0)
        return 1.0;
    double got = gpu->segments[(gpu->segment_count - 1) % SIM_SEGMENTS].target_watts - gpu->idle_watts;
    return got <= 0 ? 0.1 : fmin(1.0, cbrt(got / wanted));
}

static void settle(struct sim_state *state, int64_t now)
{
    for (uint32_t i = 0; i < state->gpu_count; i++) {
        struct sim_gpu *gpu = &state->gpus[i];
        int64_t passed = now - gpu->settled_ns;
        if (passed <= 0)
            continue;
        if (gpu->reasons & POWER_CAP)
            gpu->power_cap_ns += (uint64_t)passed;
        if (gpu->reasons & POWER_BRAKE)
            gpu->power_brake_ns += (uint64_t)passed;
        if (gpu->reasons & HW_THERMAL)
            gpu->thermal_ns += (uint64_t)passed;
        gpu->settled_ns = now;
    }
}

static void retarget(const struct sim_state *state, struct sim_gpu *gpu, int64_t now)
{
    double wanted = gpu->lost || !gpu->present ? gpu->idle_watts : demand_watts(gpu);
    double target = fmin(wanted, fmin(sim_enforced_mw(gpu) / 1000.0, module_share_watts(state, gpu)));
    uint64_t reasons = gpu->forced_reasons;
    if (target < wanted - 1e-9)
        reasons |= POWER_CAP;
    if (wanted <= gpu->idle_watts + 1e-9)
        reasons |= IDLE;
    if (gpu->forced_celsius >= 0 && gpu->forced_celsius >= gpu->slowdown_celsius)
        reasons |= HW_SLOWDOWN | HW_THERMAL;
    if (reasons & (POWER_BRAKE | HW_THERMAL))
        target = fmin(target, gpu->idle_watts + BRAKE_SHARE * (wanted - gpu->idle_watts));
    target = fmax(target, fmin(gpu->idle_watts, wanted));
    gpu->reasons = reasons;
    if (gpu->segment_count > 0
        && fabs(gpu->segments[(gpu->segment_count - 1) % SIM_SEGMENTS].target_watts - target) < 1e-9)
        return;
    struct sim_segment next = {now, sim_power_watts(gpu, now), target, sim_energy_joules(gpu, now)};
    gpu->segments[gpu->segment_count % SIM_SEGMENTS] = next;
    gpu->segment_count++;
}

/* What a driver load, a reboot or a GPU reset does to everything that NVML can set. */
void sim_reset_gpu(struct sim_state *state, struct sim_gpu *gpu)
{
    gpu->requested_mw = gpu->default_mw;
    gpu->module_requested_mw = gpu->module_default_mw;
    gpu->locked_min_mhz = gpu->locked_max_mhz = 0;
    memset(gpu->profiles_requested, 0, sizeof gpu->profiles_requested);
    gpu->energy_base_joules = sim_energy_joules(gpu, sim_now(state));
    gpu->power_cap_ns = gpu->power_brake_ns = gpu->thermal_ns = 0;
    gpu->ecc_volatile_corrected = gpu->ecc_volatile_uncorrected = 0;
}

/* With persistence off the driver forgets a GPU's settings once nobody has it open. */
static void forget_if_unused(struct sim_state *state)
{
    int clients = 0, known = 0;
    for (int i = 0; i < SIM_CLIENTS; i++) {
        if (state->clients[i] == 0)
            continue;
        known = 1;
        if (state->clients[i] == SIM_CLIENT_LEFT
            || (kill((pid_t)state->clients[i], 0) != 0 && errno == ESRCH))
            state->clients[i] = 0;
        else
            clients++;
    }
    if (!known || clients > 0)
        return;
    for (uint32_t i = 0; i < state->gpu_count; i++) {
        struct sim_gpu *gpu = &state->gpus[i];
        if (!gpu->persistence && gpu->process_count == 0)
            sim_reset_gpu(state, gpu);
    }
}

/* ---- who may touch it when ---- */

struct sim_state *sim_lock(struct sim_node *node)
{
    pthread_mutex_lock(&node->mutex);
    while (flock(node->fd, LOCK_EX) != 0 && errno == EINTR)
        ;
    forget_if_unused(node->state);
    settle(node->state, sim_now(node->state));
    return node->state;
}

void sim_unlock(struct sim_node *node)
{
    flock(node->fd, LOCK_UN);
    pthread_mutex_unlock(&node->mutex);
}

void sim_commit(struct sim_node *node)
{
    struct sim_state *state = node->state;
    int64_t now = sim_now(state);
    settle(state, now);
    for (uint32_t i = 0; i < state->gpu_count; i++)
        retarget(state, &state->gpus[i], now);
    __atomic_add_fetch(&state->wake, 1, __ATOMIC_SEQ_CST);
    sim_unlock(node);
    syscall(SYS_futex, &state->wake, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Wait without the lock until somebody commits a change, or the (real) time is up. */
void sim_wait(struct sim_node *node, uint32_t seen, int64_t timeout_ns)
{
    struct timespec ts = {timeout_ns / SECOND, timeout_ns % SECOND};
    syscall(SYS_futex, &node->state->wake, FUTEX_WAIT, seen, timeout_ns < 0 ? NULL : &ts, NULL, 0);
}
