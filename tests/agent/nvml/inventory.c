/* Which GPUs there are, how they are split, and what links them. */
#define _GNU_SOURCE
#include "nvml.h"

#include <stdio.h>
#include <string.h>

EXPORT int nvmlDeviceGetCount_v2(unsigned *to)
{
    ENTER(nvmlDeviceGetCount_v2, to);
    unsigned count = 0;
    for (uint32_t i = 0; i < c.state->gpu_count; i++)
        count += c.state->gpus[i].present != 0;
    return number(&c, to, count);
}

static int found(struct call *c, int function, uint32_t i, struct handle **to)
{
    const struct sim_fault *own = fault_for(c->state, function, (int)i);
    int error = own != NULL && own->gpu >= 0 ? suffer(c->node, c->state, function, (int)i) : SUCCESS;
    if (error != SUCCESS)
        return leave(c, error);   /* a fault of every GPU was suffered on the way in */
    if (c->state->gpus[i].lost)
        return leave(c, GPU_IS_LOST);
    *to = &whole[i];
    return leave(c, SUCCESS);
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct handle **to)
{
    ENTER(nvmlDeviceGetHandleByIndex_v2, to);
    for (uint32_t i = 0; i < c.state->gpu_count; i++)
        if (c.state->gpus[i].present && index-- == 0)
            return found(&c, F_nvmlDeviceGetHandleByIndex_v2, i, to);
    return leave(&c, INVALID_ARGUMENT);
}

static void bus_id(const struct sim_gpu *gpu, char *to) { sprintf(to, "00000000:%02X:00.0", gpu->pci_bus & 0xff); }

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, struct handle **to)
{
    ENTER(nvmlDeviceGetHandleByUUID, to);
    for (uint32_t i = 0; uuid != NULL && i < c.state->gpu_count; i++) {
        struct sim_gpu *gpu = &c.state->gpus[i];
        if (!gpu->present)
            continue;
        if (strcmp(gpu->uuid, uuid) == 0)
            return found(&c, F_nvmlDeviceGetHandleByUUID, i, to);
        for (uint32_t j = 0; gpu->mig_current && j < gpu->instance_count; j++)
            if (strcmp(gpu->instances[j].uuid, uuid) == 0) {
                *to = &slices[i][j];
                return leave(&c, SUCCESS);
            }
    }
    return leave(&c, NOT_FOUND);
}

EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, struct handle **to)
{
    char own[32];
    ENTER(nvmlDeviceGetHandleByPciBusId_v2, to);
    for (uint32_t i = 0; bus != NULL && i < c.state->gpu_count; i++) {
        bus_id(&c.state->gpus[i], own);
        if (c.state->gpus[i].present && (strcasecmp(own, bus) == 0 || strcasecmp(own + 4, bus) == 0))
            return found(&c, F_nvmlDeviceGetHandleByPciBusId_v2, i, to);
    }
    return leave(&c, NOT_FOUND);
}

EXPORT int nvmlDeviceGetHandleBySerial(const char *serial, struct handle **to)
{
    ENTER(nvmlDeviceGetHandleBySerial, to);
    for (uint32_t i = 0; serial != NULL && i < c.state->gpu_count; i++)
        if (c.state->gpus[i].present && strcmp(c.state->gpus[i].serial, serial) == 0)
            return found(&c, F_nvmlDeviceGetHandleBySerial, i, to);
    return leave(&c, NOT_FOUND);
}

EXPORT int nvmlDeviceGetName(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetName, h, 1);
    char name[128];
    if (c.instance < 0)
        return text(&c, to, length, c.gpu->name);
    struct sim_instance *m = &c.gpu->instances[c.instance];
    snprintf(name, sizeof name, "%.90s MIG %ug.%ugb", c.gpu->name, m->slices, m->memory_mib / 1000);
    return text(&c, to, length, name);
}

EXPORT int nvmlDeviceGetUUID(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetUUID, h, 1);
    return text(&c, to, length, c.instance < 0 ? c.gpu->uuid : c.gpu->instances[c.instance].uuid);
}

EXPORT int nvmlDeviceGetSerial(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetSerial, h, 0);
    return text(&c, to, length, c.gpu->serial);
}

EXPORT int nvmlDeviceGetBoardPartNumber(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetBoardPartNumber, h, 0);
    return text(&c, to, length, c.gpu->part);
}

EXPORT int nvmlDeviceGetVbiosVersion(struct handle *h, char *to, unsigned length)
{
    ENTER_ON(nvmlDeviceGetVbiosVersion, h, 0);
    return text(&c, to, length, c.gpu->vbios);
}

EXPORT int nvmlDeviceGetIndex(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetIndex, h, 0);
    unsigned place = 0;
    for (int i = 0; i < c.index; i++)
        place += c.state->gpus[i].present != 0;
    return number(&c, to, place);
}

EXPORT int nvmlDeviceGetMinorNumber(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetMinorNumber, h, 0);
    return number(&c, to, (unsigned)c.index);
}

EXPORT int nvmlDeviceGetModuleId(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetModuleId, h, 0);
    return number(&c, to, c.gpu->module);
}

EXPORT int nvmlDeviceGetArchitecture(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetArchitecture, h, 0);
    return number(&c, to, c.gpu->architecture);
}

EXPORT int nvmlDeviceGetBrand(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetBrand, h, 0);
    return number(&c, to, 14);
}

EXPORT int nvmlDeviceGetCudaComputeCapability(struct handle *h, int *major, int *minor)
{
    ENTER_ON(nvmlDeviceGetCudaComputeCapability, h, 1);
    *major = (int)c.gpu->compute_major;
    *minor = (int)c.gpu->compute_minor;
    return leave(&c, SUCCESS);
}

struct pci_info {
    char legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

EXPORT int nvmlDeviceGetPciInfo_v3(struct handle *h, struct pci_info *to)
{
    ENTER_ON(nvmlDeviceGetPciInfo_v3, h, 0);
    memset(to, 0, sizeof *to);
    to->bus = c.gpu->pci_bus;
    to->pci_device_id = c.gpu->pci_device_id;
    bus_id(c.gpu, to->bus_id);
    memcpy(to->legacy, to->bus_id + 4, strlen(to->bus_id + 4));
    return leave(&c, SUCCESS);
}

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

EXPORT int nvmlDeviceGetMemoryInfo(struct handle *h, struct memory *to)
{
    ENTER_ON(nvmlDeviceGetMemoryInfo, h, 1);
    uint32_t total = c.instance < 0 ? c.gpu->memory_mib : c.gpu->instances[c.instance].memory_mib;
    uint32_t used = c.instance < 0 ? c.gpu->used_mib : 0;
    *to = (struct memory){(uint64_t)total << 20, (uint64_t)(total - used) << 20, (uint64_t)used << 20};
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(struct handle *h, struct memory_v2 *to)
{
    ENTER_ON(nvmlDeviceGetMemoryInfo_v2, h, 1);
    if (to->version != 0x02000028)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    uint32_t total = c.instance < 0 ? c.gpu->memory_mib : c.gpu->instances[c.instance].memory_mib;
    uint32_t used = c.instance < 0 ? c.gpu->used_mib : 0;
    to->total = (uint64_t)total << 20;
    to->used = (uint64_t)used << 20;
    to->free = to->total - to->used;
    to->reserved = 0;
    return leave(&c, SUCCESS);
}

struct platform {
    unsigned version;
    uint8_t ib_guid[16], chassis[16], slot, tray, host, peer, module;
};

EXPORT int nvmlDeviceGetPlatformInfo(struct handle *h, struct platform *to)
{
    ENTER_ON(nvmlDeviceGetPlatformInfo, h, 0);
    if (!c.gpu->has_platform)
        return leave(&c, NOT_SUPPORTED);
    if (to->version != 0x200002c)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    memset(to->ib_guid, 0, sizeof to->ib_guid);
    memcpy(to->chassis, c.gpu->chassis_serial, sizeof to->chassis);
    to->slot = (uint8_t)c.gpu->slot;
    to->tray = (uint8_t)c.gpu->tray;
    to->host = (uint8_t)c.gpu->host;
    to->peer = 0;
    to->module = (uint8_t)c.gpu->module;
    return leave(&c, SUCCESS);
}

/* ---- MIG ---- */

EXPORT int nvmlDeviceGetMigMode(struct handle *h, unsigned *current, unsigned *pending)
{
    ENTER_ON(nvmlDeviceGetMigMode, h, 0);
    if (!c.gpu->mig_supported)
        return leave(&c, NOT_SUPPORTED);
    *current = c.gpu->mig_current;
    *pending = c.gpu->mig_pending;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetMaxMigDeviceCount(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetMaxMigDeviceCount, h, 0);
    return number(&c, to, c.gpu->mig_supported ? 7 : 0);
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(struct handle *h, unsigned index, struct handle **to)
{
    ENTER_ON(nvmlDeviceGetMigDeviceHandleByIndex, h, 0);
    if (!c.gpu->mig_current || index >= c.gpu->instance_count)
        return leave(&c, index >= 7 ? INVALID_ARGUMENT : NOT_FOUND);
    *to = &slices[c.index][index];
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(struct handle *h, struct handle **to)
{
    ENTER_ON(nvmlDeviceGetDeviceHandleFromMigDeviceHandle, h, 1);
    if (c.instance < 0)
        return leave(&c, INVALID_ARGUMENT);
    *to = &whole[c.index];
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceIsMigDeviceHandle(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceIsMigDeviceHandle, h, 1);
    return number(&c, to, c.instance >= 0);
}

EXPORT int nvmlDeviceGetGpuInstanceId(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetGpuInstanceId, h, 1);
    if (c.instance < 0)
        return leave(&c, NOT_SUPPORTED);
    return number(&c, to, c.gpu->instances[c.instance].gpu_instance);
}

EXPORT int nvmlDeviceGetComputeInstanceId(struct handle *h, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetComputeInstanceId, h, 1);
    if (c.instance < 0)
        return leave(&c, NOT_SUPPORTED);
    return number(&c, to, c.gpu->instances[c.instance].compute_instance);
}

/* ---- NVLink and the fabric ---- */

EXPORT int nvmlDeviceGetNvLinkState(struct handle *h, unsigned link, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetNvLinkState, h, 0);
    if (link >= c.gpu->link_count)
        return leave(&c, c.gpu->link_count ? INVALID_ARGUMENT : NOT_SUPPORTED);
    return number(&c, to, c.gpu->link_up[link]);
}

EXPORT int nvmlDeviceGetNvLinkVersion(struct handle *h, unsigned link, unsigned *to)
{
    ENTER_ON(nvmlDeviceGetNvLinkVersion, h, 0);
    if (link >= c.gpu->link_count)
        return leave(&c, c.gpu->link_count ? INVALID_ARGUMENT : NOT_SUPPORTED);
    return number(&c, to, c.gpu->link_version);
}

EXPORT int nvmlDeviceGetNvLinkErrorCounter(struct handle *h, unsigned link, unsigned counter,
                                           unsigned long long *to)
{
    ENTER_ON(nvmlDeviceGetNvLinkErrorCounter, h, 0);
    if (link >= c.gpu->link_count || counter > 4)
        return leave(&c, c.gpu->link_count ? INVALID_ARGUMENT : NOT_SUPPORTED);
    *to = counter == 0 ? c.gpu->link_errors[link] : 0;
    return leave(&c, SUCCESS);
}

struct fabric { uint8_t cluster[16]; int32_t status; uint32_t clique, state; };
struct fabric_v { uint32_t version; struct fabric info; uint32_t health_mask; uint8_t summary; };

static struct fabric fabric_of(const struct sim_gpu *gpu)
{
    struct fabric info = {.status = (int32_t)gpu->fabric_status, .clique = gpu->fabric_clique,
                          .state = gpu->fabric_state};
    memcpy(info.cluster, gpu->fabric_cluster, sizeof info.cluster);
    return info;
}

EXPORT int nvmlDeviceGetGpuFabricInfo(struct handle *h, struct fabric *to)
{
    ENTER_ON(nvmlDeviceGetGpuFabricInfo, h, 0);
    *to = fabric_of(c.gpu);
    return leave(&c, SUCCESS);
}

EXPORT int nvmlDeviceGetGpuFabricInfoV(struct handle *h, struct fabric_v *to)
{
    ENTER_ON(nvmlDeviceGetGpuFabricInfoV, h, 0);
    if (to->version != 0x02000024 && to->version != 0x3000028)
        return leave(&c, ARGUMENT_VERSION_MISMATCH);
    to->info = fabric_of(c.gpu);
    to->health_mask = c.gpu->fabric_health_mask;
    if (to->version == 0x3000028)
        to->summary = (uint8_t)c.gpu->fabric_summary;
    return leave(&c, SUCCESS);
}
