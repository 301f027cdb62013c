"""Kernels that move keys and values in and out of pages (layout: see :mod:`.config`)."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e

from . import vector as v
from .config import PANEL, KVCacheConfig


def match_pages(config: KVCacheConfig, handle):  # noqa: ANN001, ANN201 - Buffer
    """Declare the pages argument, in the runtime's shape."""
    shape = (T.int64(), 2, config.num_kv_heads, config.page_size, config.head_dim)
    return T.match_buffer(handle, shape, config.dtype)


def view_pages(config: KVCacheConfig, pages):  # noqa: ANN001, ANN201 - Buffer
    """View pages as [pages, 2, kv_heads, page_size * head_dim]; after all match_buffers."""
    shape = (pages.shape[0], 2, config.num_kv_heads, config.block)
    return T.decl_buffer(shape, config.dtype, data=pages.data)


def key_offset(config: KVCacheConfig, slot: Expr, channel: Expr | int) -> Expr:
    """Offset of one K element in the block of its page and head."""
    panel = v.div(slot, PANEL) * (PANEL * config.head_dim)
    return panel + channel * PANEL + v.mod(slot, PANEL)


def append(config: KVCacheConfig) -> tirx.PrimFunc:
    """Build the kernel that writes new keys and values into their pages.

    Arguments: pages, k and v [n, kv_heads, d], position_map int32 [n] (page * page_size + slot,
    or -1 for a token that is not kept).
    """
    kv_heads, d = config.num_kv_heads, config.head_dim

    def token(t, pages, k, value, positions) -> None:  # noqa: ANN001
        position = e.let(positions[t], "position")
        with T.If(position >= 0), T.Then():
            page = e.let(v.div(position, config.page_size).astype("int64"), "page")
            slot = e.let(v.mod(position, config.page_size), "slot")
            with T.serial(0, kv_heads) as h:
                with T.serial(0, d) as i:
                    T.buffer_store(pages, k[t, h, i], [page, 0, h, key_offset(config, slot, i)])
                with T.serial(0, d // v.LANES) as j:
                    row = v.load(value, [t, h, j * v.LANES])
                    v.store(pages, row, [page, 1, h, slot * d + j * v.LANES])

    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_kv_append")
            handles = [T.arg(n, T.handle()) for n in ("pages", "k", "v", "position_map")]
            n, offset = T.int32(), T.int32()
            pages = match_pages(config, handles[0])
            k = T.match_buffer(handles[1], (n, kv_heads, d), config.dtype)
            value = T.match_buffer(handles[2], (n, kv_heads, d), config.dtype)
            positions = T.match_buffer(handles[3], (n,), "int32", elem_offset=offset)
            pages = view_pages(config, pages)
            v.over_tokens(n, lambda t: token(t, pages, k, value, positions))
        return builder.get()


def copy_single_page(config: KVCacheConfig) -> tirx.PrimFunc:
    """Build the kernel that copies a page for a fork: pages, source, target, length (int64).

    Slots beyond the length are copied too: a page is one contiguous block, and what lies behind a
    sequence's length is never read.
    """
    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_kv_copy_page")
            handle = T.arg("pages", T.handle())
            source = T.arg("source", T.int64())
            target = T.arg("target", T.int64())
            T.arg("length", T.int64())
            pages = match_pages(config, handle)
            pages = view_pages(config, pages)
            with T.serial(0, 2) as kv, T.serial(0, config.num_kv_heads) as h:
                with T.serial(0, config.block // v.LANES) as j:
                    row = v.load(pages, [source, kv, h, j * v.LANES])
                    v.store(pages, row, [target, kv, h, j * v.LANES])
        return builder.get()


def debug_get_kv(config: KVCacheConfig) -> tirx.PrimFunc:
    """Build the kernel that reads keys and values of given positions back.

    Arguments: pages, position_map int32 [n], k and v [layers, n, kv_heads, d], layer (int64).
    """
    kv_heads, d = config.num_kv_heads, config.head_dim
    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_kv_debug_get")
            handles = [T.arg(n, T.handle()) for n in ("pages", "position_map", "k", "v")]
            layer = T.arg("layer", T.int64())
            n, offset = T.int64(), T.int64()
            pages = match_pages(config, handles[0])
            positions = T.match_buffer(handles[1], (n,), "int32", elem_offset=offset)
            shape = (config.layers, n, kv_heads, d)
            k = T.match_buffer(handles[2], shape, config.dtype)
            value = T.match_buffer(handles[3], shape, config.dtype)
            pages = view_pages(config, pages)
            with T.serial(0, n) as t:
                page = e.let(v.div(positions[t], config.page_size).astype("int64"), "page")
                slot = e.let(v.mod(positions[t], config.page_size), "slot")
                with T.serial(0, kv_heads) as h, T.serial(0, d) as i:
                    key = pages[page, 0, h, key_offset(config, slot, i)]
                    T.buffer_store(k, key, [layer, t, h, i])
                    T.buffer_store(value, pages[page, 1, h, slot * d + i], [layer, t, h, i])
        return builder.get()


def compact_copy(config: KVCacheConfig) -> tirx.PrimFunc:
    """Build the kernel that moves accepted tokens together after a tree was verified.

    Arguments: pages, copy_length_indptr int32 [batch + 1], copy_src_dst_pos int32 [2, n], batch.
    """
    kv_heads, d = config.num_kv_heads, config.head_dim
    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_kv_compact_copy")
            handles = [T.arg(n, T.handle()) for n in ("pages", "indptr", "src_dst")]
            batch = T.arg("batch", T.int32())
            n, indptr_offset, copies_offset = T.int32(), T.int32(), T.int32()
            pages = match_pages(config, handles[0])
            indptr = T.match_buffer(handles[1], (batch + 1,), "int32", elem_offset=indptr_offset)
            copies = T.match_buffer(handles[2], (2, n), "int32", elem_offset=copies_offset)
            pages = view_pages(config, pages)
            with T.serial(0, indptr[batch]) as i:
                place = []
                for row in (0, 1):
                    position = e.let(copies[row, i], "position")
                    page = v.div(position, config.page_size).astype("int64")
                    slot = v.mod(position, config.page_size)
                    place.append((e.let(page, "page"), e.let(slot, "slot")))
                (from_page, from_slot), (to_page, to_slot) = place
                with T.serial(0, kv_heads) as h, T.serial(0, d) as c:
                    key = pages[from_page, 0, h, key_offset(config, from_slot, c)]
                    T.buffer_store(pages, key, [to_page, 0, h, key_offset(config, to_slot, c)])
                    value = pages[from_page, 1, h, from_slot * d + c]
                    T.buffer_store(pages, value, [to_page, 1, h, to_slot * d + c])
        return builder.get()
