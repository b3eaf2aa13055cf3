/* Limits, power, energy, and the workload profiles that change what a GPU wants. */
#include "nvml.h"

#include <string.h>

EXPORT int nvmlDeviceGetPowerManagementMode(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPowerManagementMode, h, 0);
    return number(&c, to, c.gpu->limits_supported != 0);
}

#define LIMIT(fn, value) \
    EXPORT int fn(struct handle *h, unsigned *to) \
    { \
        ENTER_ON(fn, h, 0); \
        if (!c.gpu->limits_supported) \
            return leave(&c, NOT_SUPPORTED); \
        return number(&c, to, (value)); \
    }

LIMIT(nvmlDeviceGetPowerManagementLimit, c.gpu->requested_mw)
LIMIT(nvmlDeviceGetPowerManagementDefaultLimit, c.gpu->default_mw)
LIMIT(nvmlDeviceGetEnforcedPowerLimit, sim_enforced_mw(c.gpu))

EXPORT int nvmlDeviceGetPowerManagementLimitConstraints(struct handle *h, unsigned *least, unsigned *most)
{
    ENTER_ON(nvmlDeviceGetPowerManagementLimitConstraints, h, 0);
    if (!c.gpu->limits_supported)
        return leave(&c, NOT_SUPPORTED);
    *least = c.gpu->min_mw;
    *most = c.gpu->max_mw;
    return leave(&c, SUCCESS);
}

static int set_limit(struct call *c, unsigned scope, unsigned mw)
{
    struct sim_gpu *gpu = c->gpu;
    if (scope > 1 || !gpu->limits_supported || (scope == 1 && gpu->module_max_mw == 0))
        return leave(c, NOT_SUPPORTED);
    if (!may_write(c))
        return leave(c, NO_PERMISSION);
    uint32_t least = scope == 1 ? gpu->module_min_mw : gpu->min_mw;
    uint32_t most = scope == 1 ? gpu->module_max_mw : gpu->max_mw;
    if (mw < least || mw > most)
        return leave(c, INVALID_ARGUMENT);
    c->state->limit_writes[c->index]++;
    c->state->limit_set_ns[c->index] = now(c);
    if (gpu->ignore_limit_writes)
        return leave(c, SUCCESS);
    c->dirty = 1;
    if (scope == 0) {
        gpu->requested_mw = mw;
        return leave(c, SUCCESS);
    }
    for (uint32_t i = 0; i < c->state->gpu_count; i++)   /* one limit, seen from each GPU of the module */
        if (c->state->gpus[i].module == gpu->module)
            c->state->gpus[i].module_requested_mw = mw;
    return leave(c, SUCCESS);
}

EXPORT int nvmlDeviceSetPowerManagementLimit(struct handle *h, unsigned mw)
{
    ENTER_ON(nvmlDeviceSetPowerManagementLimit, h, 0);
    return set_limit(&c, 0, mw);
}

struct power_value { unsigned version, scope, mw; };

EXPORT int nvmlDeviceSetPowerManagementLimit_v2(struct handle *h, const struct power_value *value)
{
    ENTER_ON(nvmlDeviceSetPowerManagementLimit_v2, h, 0);
    if (value->version != 0x0200000C)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    return set_limit(&c, value->scope, value->mw);
}

static double module_watts(const struct call *c, double (*of)(const struct sim_gpu *, int64_t))
{
    double sum = c->gpu->module_other_watts;
    for (uint32_t i = 0; i < c->state->gpu_count; i++)
        if (c->state->gpus[i].module == c->gpu->module)
            sum += c->state->gpus[i].sensor_gain * of(&c->state->gpus[i], now(c));
    return sum;
}

static unsigned average_mw(const struct call *c)
{
    return (unsigned)(1000.0 * c->gpu->sensor_gain * sim_average_watts(c->gpu, now(c)));
}

static uint64_t energy_mj(const struct call *c)
{
    double joules = sim_energy_joules(c->gpu, now(c)) - c->gpu->energy_base_joules;
    return (uint64_t)(1000.0 * c->gpu->sensor_gain * joules);
}

EXPORT int nvmlDeviceGetPowerUsage(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetPowerUsage, h, 0);
    return number(&c, to, average_mw(&c));
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(struct handle *h, unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetTotalEnergyConsumption, h, 0);
    *to = energy_mj(&c);
    return leave(&c, SUCCESS);
}

struct field_value {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    uint32_t type;
    int32_t result;
    union { double d; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; } value;
};

static int put(struct field_value *v, int wide, uint64_t value)
{
    v->value.ull = 0;
    v->type = wide ? 3 : 1;
    if (wide)
        v->value.ull = value;
    else
        v->value.ui = (unsigned)value;
    return SUCCESS;
}

static int module_field(const struct call *c, struct field_value *v)
{
    if (c->gpu->module_max_mw == 0)
        return NOT_SUPPORTED;
    switch (v->field) {
    case 185: return put(v, 0, (uint64_t)(1000.0 * module_watts(c, sim_average_watts)));
    case 186: return put(v, 0, (uint64_t)(1000.0 * module_watts(c, sim_power_watts)));
    case 187: return put(v, 0, c->gpu->module_min_mw);
    case 188: return put(v, 0, c->gpu->module_max_mw);
    case 189: return put(v, 0, c->gpu->module_default_mw);
    case 190: case 192: return put(v, 0, c->gpu->module_requested_mw);
    default: return NOT_SUPPORTED;
    }
}

static int field(const struct call *c, struct field_value *v)
{
    const struct sim_gpu *gpu = c->gpu;
    unsigned id = v->field;
    if (v->scope == 1 && id >= 185 && id <= 192)
        return module_field(c, v);
    if (v->scope == 2 && id >= 185 && id <= 192)
        return gpu->memory_scope_mw && id <= 186 ? put(v, 0, gpu->memory_scope_mw) : NOT_SUPPORTED;
    if (id >= 187 && id <= 192 && id != 191 && !gpu->limits_supported)
        return NOT_SUPPORTED;
    switch (id) {
    case 74: return put(v, 1, gpu->power_cap_ns);
    case 82: return put(v, 0, (uint64_t)sim_celsius(gpu, now(c)) + 6);
    case 83: case 191: return put(v, 1, energy_mj(c));
    case 91: return put(v, 0, gpu->link_count);
    case 142: return put(v, 0, gpu->remap_correctable);
    case 143: return put(v, 0, gpu->remap_uncorrectable);
    case 144: return put(v, 0, gpu->remap_pending);
    case 145: return put(v, 0, gpu->remap_failure);
    case 185: return put(v, 0, average_mw(c));
    case 186: return put(v, 0, (uint64_t)(1000.0 * gpu->sensor_gain * sim_power_watts(gpu, now(c))));
    case 187: return put(v, 0, gpu->min_mw);
    case 188: return put(v, 0, gpu->max_mw);
    case 189: return put(v, 0, gpu->default_mw);
    case 190: return put(v, 0, sim_enforced_mw(gpu));
    case 192: return put(v, 0, gpu->requested_mw);
    case 230: return put(v, 0, gpu->recovery_action);
    case 270: return put(v, 1, gpu->thermal_ns);
    case 271: return put(v, 1, gpu->power_brake_ns);
    default: return NOT_SUPPORTED;
    }
}

EXPORT int nvmlDeviceGetFieldValues(struct handle *h, int count, struct field_value *values)
{
    ENTER_ON(nvmlDeviceGetFieldValues, h, 0);
    for (int i = 0; i < count; i++) {
        values[i].timestamp = now(&c) / 1000;
        values[i].latency_us = 0;
        values[i].result = field(&c, &values[i]);
    }
    return leave(&c, SUCCESS);
}

/* ---- workload power profiles ---- */

struct profile { uint32_t version, id, priority, conflicts[SIM_MASK]; };
struct profiles { uint32_t version, mask[SIM_MASK]; struct profile profile[255]; };
struct current_profiles { uint32_t version, supported[SIM_MASK], requested[SIM_MASK], enforced[SIM_MASK]; };
struct requested_profiles { uint32_t version, mask[SIM_MASK]; };
struct update_profiles { uint32_t operation, mask[SIM_MASK]; };

static int has_profiles(const struct sim_gpu *gpu)
{
    for (int i = 0; i < SIM_MASK; i++)
        if (gpu->profiles_supported[i])
            return 1;
    return 0;
}

EXPORT int nvmlDeviceWorkloadPowerProfileGetProfilesInfo(struct handle *h, struct profiles *to)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileGetProfilesInfo, h, 0);
    if (!has_profiles(c.gpu))
        return leave(&c, NOT_SUPPORTED);
    if (to->version != 0x1002bf8)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    memset(to->mask, 0, sizeof *to - sizeof to->version);
    memcpy(to->mask, c.gpu->profiles_supported, sizeof to->mask);
    for (uint32_t i = 0; i < 255; i++)
        if (to->mask[i / 32] >> (i % 32) & 1)
            to->profile[i] = (struct profile){.version = 0x100002c, .id = i, .priority = i};
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceWorkloadPowerProfileGetCurrentProfiles(struct handle *h, struct current_profiles *to)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileGetCurrentProfiles, h, 0);
    if (!has_profiles(c.gpu))
        return leave(&c, NOT_SUPPORTED);
    if (to->version != 0x1000064)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    memcpy(to->supported, c.gpu->profiles_supported, sizeof to->supported);
    memcpy(to->requested, c.gpu->profiles_requested, sizeof to->requested);
    memcpy(to->enforced, c.gpu->profiles_requested, sizeof to->enforced);
    return leave(&c, SUCCESS);
}

static int update(struct call *c, unsigned operation, const uint32_t *mask)
{
    if (!has_profiles(c->gpu))
        return leave(c, NOT_SUPPORTED);
    if (!may_write(c))
        return leave(c, NO_PERMISSION);
    for (int i = 0; i < SIM_MASK; i++)
        if (mask[i] & ~c->gpu->profiles_supported[i])
            return leave(c, INVALID_ARGUMENT);
    if (operation > 2)
        return leave(c, INVALID_ARGUMENT);
    for (int i = 0; i < SIM_MASK; i++) {
        uint32_t *now_set = &c->gpu->profiles_requested[i];
        if (operation == 0 && !c->gpu->ignore_profile_clear)
            *now_set &= ~mask[i];
        else if (operation == 1)
            *now_set |= mask[i];
        else if (operation == 2)
            *now_set = mask[i];
    }
    c->dirty = 1;
    return leave(c, SUCCESS);
}

EXPORT int nvmlDeviceWorkloadPowerProfileSetRequestedProfiles(struct handle *h,
                                                              const struct requested_profiles *wanted)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileSetRequestedProfiles, h, 0);
    if (wanted->version != 0x1000024)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    return update(&c, 1, wanted->mask);
}

EXPORT int nvmlDeviceWorkloadPowerProfileClearRequestedProfiles(struct handle *h,
                                                                const struct requested_profiles *wanted)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileClearRequestedProfiles, h, 0);
    if (wanted->version != 0x1000024)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    return update(&c, 0, wanted->mask);
}

EXPORT int nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1(struct handle *h, const struct update_profiles *wanted)
{
    ENTER_ON(nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1, h, 0);
    return update(&c, wanted->operation, wanted->mask);
}
