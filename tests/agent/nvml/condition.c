/* How a GPU is doing: temperature, clocks and why they are low, memory errors, who runs on it. */
#include "nvml.h"

EXPORT int nvmlDeviceGetTemperature(struct handle *h, unsigned sensor, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetTemperature, h, 0);
    if (sensor != 0)
        return leave(&c, INVALID_ARGUMENT);
    return number(&c, to, (unsigned)sim_celsius(c.gpu, now(&c)));
}

struct temperature { unsigned version, sensor; int celsius; };

EXPORT int nvmlDeviceGetTemperatureV(struct handle *h, struct temperature *to)
{
    ENTER_ON(nvmlDeviceGetTemperatureV, h, 0);
    if (to->version != 0x100000C)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    if (to->sensor != 0)
        return leave(&c, INVALID_ARGUMENT);
    to->celsius = (int)sim_celsius(c.gpu, now(&c));
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetTemperatureThreshold(struct handle *h, unsigned which, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetTemperatureThreshold, h, 0);
    if (which > 1)
        return leave(&c, NOT_SUPPORTED);
    return number(&c, to, which == 0 ? c.gpu->shutdown_celsius : c.gpu->slowdown_celsius);
}

struct utilization { unsigned gpu, memory; };

EXPORT int nvmlDeviceGetUtilizationRates(struct handle *h, struct utilization *to)
{
    ENTER_ON(nvmlDeviceGetUtilizationRates, h, 0);
    if (c.gpu->mig_current)
        return leave(&c, NOT_SUPPORTED);
    double span = c.gpu->full_watts - c.gpu->idle_watts;
    double busy = c.gpu->demand_watts >= 0 ? (c.gpu->demand_watts - c.gpu->idle_watts) / span : c.gpu->load;
    busy = busy < 0 ? 0 : busy > 1 ? 1 : busy;
    to->gpu = busy > 0 ? (unsigned)(100.0 * busy + 0.5) : 0;
    to->memory = to->gpu / 2;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetPerformanceState(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPerformanceState, h, 0);
    return number(&c, to, 0);
}

static int max_clock(const struct sim_gpu *gpu, unsigned which, unsigned *mhz)
{
    *mhz = which == 2 ? gpu->max_memory_mhz : gpu->max_sm_mhz;
    return which <= 3;
}

EXPORT int nvmlDeviceGetClockInfo(struct handle *h, unsigned which, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetClockInfo, h, 0);
    unsigned mhz;
    if (!max_clock(c.gpu, which, &mhz))
        return leave(&c, INVALID_ARGUMENT);
    if (which != 2) {
        if (c.gpu->locked_max_mhz != 0 && c.gpu->locked_max_mhz < mhz)
            mhz = c.gpu->locked_max_mhz;
        mhz = (unsigned)(mhz * sim_clock_share(c.gpu));
    }
    return number(&c, to, mhz);
}

EXPORT int nvmlDeviceGetMaxClockInfo(struct handle *h, unsigned which, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetMaxClockInfo, h, 0);
    unsigned mhz;
    if (!max_clock(c.gpu, which, &mhz))
        return leave(&c, INVALID_ARGUMENT);
    return number(&c, to, mhz);
}

EXPORT int nvmlDeviceSetGpuLockedClocks(struct handle *h, unsigned least, unsigned most)
{
    ENTER_ON(nvmlDeviceSetGpuLockedClocks, h, 0);
    if (!may_write(&c))
        return leave(&c, NO_PERMISSION);
    if (least > most || most > c.gpu->max_sm_mhz)
        return leave(&c, INVALID_ARGUMENT);
    c.gpu->locked_min_mhz = least;
    c.gpu->locked_max_mhz = most;
    c.dirty = 1;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceResetGpuLockedClocks(struct handle *h)
{
    ENTER_ON(nvmlDeviceResetGpuLockedClocks, h, 0);
    if (!may_write(&c))
        return leave(&c, NO_PERMISSION);
    c.gpu->locked_min_mhz = c.gpu->locked_max_mhz = 0;
    c.dirty = 1;
    return leave(&c, SUCCESS);
}

#define REASONS(fn, value) \
    EXPORT int fn(struct handle *h, unsigned long long *to) \
    { \
        ENTER_ON(fn, h, 0); \
        *to = (value); \
        return leave(&c, SUCCESS); \
    }

REASONS(nvmlDeviceGetCurrentClocksEventReasons, c.gpu->reasons)
REASONS(nvmlDeviceGetCurrentClocksThrottleReasons, c.gpu->reasons)
REASONS(nvmlDeviceGetSupportedClocksEventReasons, 0x1ff)
REASONS(nvmlDeviceGetSupportedClocksThrottleReasons, 0x1ff)

struct violation { unsigned long long reference_us, violation_ns; };

EXPORT int nvmlDeviceGetViolationStatus(struct handle *h, unsigned policy, struct violation *to)
{
    ENTER_ON(nvmlDeviceGetViolationStatus, h, 0);
    if (policy > 1)
        return leave(&c, NOT_SUPPORTED);
    to->reference_us = (uint64_t)now(&c) / 1000;
    to->violation_ns = policy == 0 ? c.gpu->power_cap_ns : c.gpu->thermal_ns;
    return leave(&c, SUCCESS);
}

/* ---- memory errors, persistence, processes ---- */

EXPORT int nvmlDeviceGetEccMode(struct handle *h, unsigned *current, unsigned *pending)
{
    ENTER_ON(nvmlDeviceGetEccMode, h, 0);
    if (!c.gpu->ecc_supported)
        return leave(&c, NOT_SUPPORTED);
    *current = *pending = 1;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetTotalEccErrors(struct handle *h, unsigned type, unsigned counter, unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetTotalEccErrors, h, 0);
    if (!c.gpu->ecc_supported)
        return leave(&c, NOT_SUPPORTED);
    if (type > 1 || counter > 1)
        return leave(&c, INVALID_ARGUMENT);
    *to = counter == 0 ? (type == 0 ? c.gpu->ecc_volatile_corrected : c.gpu->ecc_volatile_uncorrected)
                       : (type == 0 ? c.gpu->ecc_aggregate_corrected : c.gpu->ecc_aggregate_uncorrected);
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetRemappedRows(struct handle *h, unsigned *correctable, unsigned *uncorrectable,
                                     unsigned *pending, unsigned *failure)
{
    ENTER_ON(nvmlDeviceGetRemappedRows, h, 0);
    if (!c.gpu->ecc_supported || c.gpu->mig_current)
        return leave(&c, NOT_SUPPORTED);
    *correctable = c.gpu->remap_correctable;
    *uncorrectable = c.gpu->remap_uncorrectable;
    *pending = c.gpu->remap_pending;
    *failure = c.gpu->remap_failure;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetPersistenceMode(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPersistenceMode, h, 0);
    return number(&c, to, c.gpu->persistence);
}

EXPORT int nvmlDeviceSetPersistenceMode(struct handle *h, unsigned mode)
{
    ENTER_ON(nvmlDeviceSetPersistenceMode, h, 0);
    if (!may_write(&c))
        return leave(&c, NO_PERMISSION);
    c.gpu->persistence = mode != 0;
    return leave(&c, SUCCESS);
}

struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(struct handle *h, unsigned *count, struct process *to)
{
    ENTER_ON(nvmlDeviceGetComputeRunningProcesses_v3, h, 1);
    unsigned room = *count;
    *count = c.gpu->process_count;
    if (*count == 0)
        return leave(&c, SUCCESS);
    if (to == NULL || room < *count)
        return leave(&c, INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < *count; i++) {
        struct sim_process *p = &c.gpu->processes[i];
        to[i] = (struct process){p->pid, (uint64_t)p->memory_mib << 20, 0xffffffffu, 0xffffffffu};
    }
    return leave(&c, SUCCESS);
}
