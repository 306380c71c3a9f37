/* What every instruction without effects on memory computes, by lane.
 *
 * X(name, PTX, type of the result, types of the operands, expression of operands a, b, c).
 * Registers of 16 bits take 32, of which the upper half is zero.
 */
#define BINARY(X) \
    X(add_s32, "add.s32", u32, u32, u32, a + b) \
    X(add_u32, "add.u32", u32, u32, u32, a + b) \
    X(sub_s32, "sub.s32", u32, u32, u32, a - b) \
    X(sub_u32, "sub.u32", u32, u32, u32, a - b) \
    X(mul_lo_s32, "mul.lo.s32", u32, u32, u32, a * b) \
    X(mul_lo_u32, "mul.lo.u32", u32, u32, u32, a * b) \
    X(mul_hi_s32, "mul.hi.s32", u32, s32, s32, (u32)(((s64)a * (s64)b) >> 32)) \
    X(mul_hi_u32, "mul.hi.u32", u32, u32, u32, (u32)(((u64)a * (u64)b) >> 32)) \
    X(mul_wide_s32, "mul.wide.s32", u64, s32, s32, (u64)((s64)a * (s64)b)) \
    X(mul_wide_u32, "mul.wide.u32", u64, u32, u32, (u64)a * (u64)b) \
    X(add_s64, "add.s64", u64, u64, u64, a + b) \
    X(add_u64, "add.u64", u64, u64, u64, a + b) \
    X(sub_s64, "sub.s64", u64, u64, u64, a - b) \
    X(mul_lo_s64, "mul.lo.s64", u64, u64, u64, a * b) \
    X(div_s32, "div.s32", u32, s32, s32, \
      b == 0 || (b == -1 && a == INT32_MIN) ? 0x7fffffffu : (u32)(a / b)) \
    X(div_u32, "div.u32", u32, u32, u32, b == 0 ? 0xffffffffu : a / b) \
    X(rem_s32, "rem.s32", u32, s32, s32, b == 0 || b == -1 ? 0u : (u32)(a % b)) \
    X(rem_u32, "rem.u32", u32, u32, u32, b == 0 ? a : a % b) \
    X(and_b32, "and.b32", u32, u32, u32, a & b) \
    X(or_b32, "or.b32", u32, u32, u32, a | b) \
    X(xor_b32, "xor.b32", u32, u32, u32, a ^ b) \
    X(and_b16, "and.b16", u32, u32, u32, a & b) \
    X(or_b16, "or.b16", u32, u32, u32, a | b) \
    X(xor_b16, "xor.b16", u32, u32, u32, a ^ b) \
    X(and_b64, "and.b64", u64, u64, u64, a & b) \
    X(or_b64, "or.b64", u64, u64, u64, a | b) \
    X(xor_b64, "xor.b64", u64, u64, u64, a ^ b) \
    X(shl_b16, "shl.b16", u32, u32, u32, b > 15 ? 0 : (a << b) & 0xffff) \
    X(shr_u16, "shr.u16", u32, u32, u32, b > 15 ? 0 : (a & 0xffff) >> b) \
    X(shl_b32, "shl.b32", u32, u32, u32, b > 31 ? 0 : a << b) \
    X(shr_u32, "shr.u32", u32, u32, u32, b > 31 ? 0 : a >> b) \
    X(shr_b32, "shr.b32", u32, u32, u32, b > 31 ? 0 : a >> b) \
    X(shr_s32, "shr.s32", u32, s32, u32, (u32)(a >> (b > 31 ? 31 : b))) \
    X(shl_b64, "shl.b64", u64, u64, u32, b > 63 ? 0 : a << b) \
    X(shr_u64, "shr.u64", u64, u64, u32, b > 63 ? 0 : a >> b) \
    X(shr_s64, "shr.s64", u64, s64, u32, (u64)(a >> (b > 63 ? 63 : b))) \
    X(min_s32, "min.s32", u32, s32, s32, (u32)(a < b ? a : b)) \
    X(max_s32, "max.s32", u32, s32, s32, (u32)(a > b ? a : b)) \
    X(min_u32, "min.u32", u32, u32, u32, a < b ? a : b) \
    X(max_u32, "max.u32", u32, u32, u32, a > b ? a : b) \
    X(min_s64, "min.s64", u64, s64, s64, (u64)(a < b ? a : b)) \
    X(max_s64, "max.s64", u64, s64, s64, (u64)(a > b ? a : b)) \
    X(min_u64, "min.u64", u64, u64, u64, a < b ? a : b) \
    X(max_u64, "max.u64", u64, u64, u64, a > b ? a : b) \
    X(sub_u64, "sub.u64", u64, u64, u64, a - b) \
    X(mul_lo_u64, "mul.lo.u64", u64, u64, u64, a * b) \
    X(mul_hi_s64, "mul.hi.s64", u64, s64, s64, (u64)(((__int128)a * b) >> 64)) \
    X(mul_hi_u64, "mul.hi.u64", u64, u64, u64, (u64)(((unsigned __int128)a * b) >> 64)) \
    X(div_s64, "div.s64", u64, s64, s64, \
      b == 0 || (b == -1 && a == INT64_MIN) ? ~0ull : (u64)(a / b)) \
    X(div_u64, "div.u64", u64, u64, u64, b == 0 ? ~0ull : a / b) \
    X(rem_s64, "rem.s64", u64, s64, s64, b == 0 || b == -1 ? 0ull : (u64)(a % b)) \
    X(rem_u64, "rem.u64", u64, u64, u64, b == 0 ? a : a % b) \
    X(mul_lo_s16, "mul.lo.s16", u32, u32, u32, (a * b) & 0xffff) \
    X(mul_lo_u16, "mul.lo.u16", u32, u32, u32, (a * b) & 0xffff) \
    X(add_s16, "add.s16", u32, u32, u32, (a + b) & 0xffff) \
    X(sub_s16, "sub.s16", u32, u32, u32, (a - b) & 0xffff) \
    X(mul_hi_u16, "mul.hi.u16", u32, u32, u32, ((a & 0xffff) * (b & 0xffff)) >> 16) \
    X(mul_hi_s16, "mul.hi.s16", u32, u32, u32, \
      ((u32)((s32)(int16_t)a * (s32)(int16_t)b) >> 16) & 0xffff) \
    X(min_u16, "min.u16", u32, u32, u32, (a & 0xffff) < (b & 0xffff) ? a : b) \
    X(max_u16, "max.u16", u32, u32, u32, (a & 0xffff) > (b & 0xffff) ? a : b) \
    X(mul_wide_u16, "mul.wide.u16", u32, u32, u32, (a & 0xffff) * (b & 0xffff)) \
    X(mul_wide_s16, "mul.wide.s16", u32, u32, u32, (u32)((s32)(int16_t)a * (s32)(int16_t)b)) \
    X(shr_s16, "shr.s16", u32, u32, u32, \
      (u32)((s32)(int16_t)a >> (b > 15 ? 15 : b)) & 0xffff) \
    X(add_f32, "add.f32", f32, f32, f32, a + b) \
    X(sub_f32, "sub.f32", f32, f32, f32, a - b) \
    X(mul_f32, "mul.f32", f32, f32, f32, a * b) \
    X(add_rn_f32, "add.rn.f32", f32, f32, f32, a + b) \
    X(mul_rn_f32, "mul.rn.f32", f32, f32, f32, a * b) \
    X(add_f32x2, "add.f32x2", u64, u64, u64, pair(low(a) + low(b), high(a) + high(b))) \
    X(add_rn_f32x2, "add.rn.f32x2", u64, u64, u64, pair(low(a) + low(b), high(a) + high(b))) \
    X(mul_f32x2, "mul.f32x2", u64, u64, u64, pair(low(a) * low(b), high(a) * high(b))) \
    X(mul_rn_f32x2, "mul.rn.f32x2", u64, u64, u64, pair(low(a) * low(b), high(a) * high(b))) \
    X(add_f32_bf16, "add.rn.f32.bf16", f32, u32, f32, from_bf16(a) + b) \
    X(add_f32_f16, "add.rn.f32.f16", f32, u32, f32, from_f16(a) + b) \
    X(max_f32, "max.f32", f32, f32, f32, __builtin_fmaxf(a, b)) \
    X(min_f32, "min.f32", f32, f32, f32, __builtin_fminf(a, b)) \
    X(add_f64, "add.f64", f64, f64, f64, a + b) \
    X(sub_f64, "sub.f64", f64, f64, f64, a - b) \
    X(mul_f64, "mul.f64", f64, f64, f64, a * b) \
    X(add_rn_f64, "add.rn.f64", f64, f64, f64, a + b)

#define UNARY(X) \
    X(mov_b32, "mov.b32", u32, u32, a) \
    X(mov_b64, "mov.b64", u64, u64, a) \
    X(neg_s32, "neg.s32", u32, u32, 0u - a) \
    X(not_b32, "not.b32", u32, u32, ~a) \
    X(abs_s32, "abs.s32", u32, s32, (u32)(a < 0 ? -a : a)) \
    X(neg_f32, "neg.f32", u32, u32, a ^ 0x80000000u) \
    X(neg_s64, "neg.s64", u64, u64, 0ull - a) \
    X(abs_s64, "abs.s64", u64, s64, (u64)(a < 0 ? -a : a)) \
    X(not_b64, "not.b64", u64, u64, ~a) \
    X(not_b16, "not.b16", u32, u32, ~a & 0xffff) \
    X(cvt_s32_s16, "cvt.s32.s16", u32, u32, (u32)(s32)(int16_t)a) \
    X(cvt_u32_u8, "cvt.u32.u8", u32, u32, a & 0xff) \
    X(cvt_u16_u8, "cvt.u16.u8", u32, u32, a & 0xff) \
    X(cvt_s16_s8, "cvt.s16.s8", u32, u32, (u32)(s32)(signed char)a & 0xffff) \
    X(cvt_s32_s8, "cvt.s32.s8", u32, u32, (u32)(s32)(signed char)a) \
    X(cvt_u64_u16, "cvt.u64.u16", u64, u32, (u64)(a & 0xffff)) \
    X(cvt_u16_u64, "cvt.u16.u64", u32, u64, (u32)a & 0xffff) \
    X(cvt_s64_s16, "cvt.s64.s16", u64, u32, (u64)(s64)(int16_t)a) \
    X(cvt_s64_s32, "cvt.s64.s32", u64, s32, (u64)(s64)a) \
    X(cvt_u64_u32, "cvt.u64.u32", u64, u32, (u64)a) \
    X(cvt_u32_u64, "cvt.u32.u64", u32, u64, (u32)a) \
    X(cvt_u16_u32, "cvt.u16.u32", u32, u32, a & 0xffff) \
    X(cvt_u32_u16, "cvt.u32.u16", u32, u32, a & 0xffff) \
    X(cvt_f32_bf16, "cvt.f32.bf16", f32, u32, from_bf16(a)) \
    X(cvt_f32_f16, "cvt.f32.f16", f32, u32, from_f16(a)) \
    X(cvt_bf16_f32, "cvt.rn.bf16.f32", u32, f32, to_bf16(a)) \
    X(cvt_f16_f32, "cvt.rn.f16.f32", u32, f32, to_f16(a)) \
    X(cvt_f64_f32, "cvt.f64.f32", f64, f32, (f64)a) \
    X(cvt_f32_f64, "cvt.rn.f32.f64", f32, f64, (f32)a) \
    X(cvt_rna_tf32, "cvt.rna.tf32.f32", u32, u32, to_tf32(a))

#define TERNARY(X) \
    X(mad_lo_s32, "mad.lo.s32", u32, u32, u32, u32, a * b + c) \
    X(mad_lo_u32, "mad.lo.u32", u32, u32, u32, u32, a * b + c) \
    X(mad_lo_u16, "mad.lo.u16", u32, u32, u32, u32, (a * b + c) & 0xffff) \
    X(mad_lo_s16, "mad.lo.s16", u32, u32, u32, u32, (a * b + c) & 0xffff) \
    X(mad_wide_u16, "mad.wide.u16", u32, u32, u32, u32, (a & 0xffff) * (b & 0xffff) + c) \
    X(mad_lo_s64, "mad.lo.s64", u64, u64, u64, u64, a * b + c) \
    X(mad_wide_s32, "mad.wide.s32", u64, s32, s32, u64, (u64)((s64)a * (s64)b) + c) \
    X(mad_wide_u32, "mad.wide.u32", u64, u32, u32, u64, (u64)a * (u64)b + c) \
    X(fma_f32, "fma.rn.f32", f32, f32, f32, f32, __builtin_fmaf(a, b, c)) \
    X(fma_f64, "fma.rn.f64", f64, f64, f64, f64, __builtin_fma(a, b, c)) \
    X(fma_f32x2, "fma.rn.f32x2", u64, u64, u64, u64, \
      pair(__builtin_fmaf(low(a), low(b), low(c)), __builtin_fmaf(high(a), high(b), high(c)))) \
    X(fma_f32_bf16, "fma.rn.f32.bf16", f32, u32, u32, f32, \
      __builtin_fmaf(from_bf16(a), from_bf16(b), c)) \
    X(fma_f32_f16, "fma.rn.f32.f16", f32, u32, u32, f32, \
      __builtin_fmaf(from_f16(a), from_f16(b), c)) \
    X(bfe_u32, "bfe.u32", u32, u32, u32, u32, bfe_u(a, b, c)) \
    X(bfe_s32, "bfe.s32", u32, u32, u32, u32, bfe_s(a, b, c)) \
    X(bfe_u64, "bfe.u64", u64, u64, u32, u32, bfe_u64(a, b, c)) \
    X(bfe_s64, "bfe.s64", u64, u64, u32, u32, bfe_s64(a, b, c)) \
    X(prmt_b32, "prmt.b32", u32, u32, u32, u32, prmt(a, b, c)) \
    X(shf_l_wrap, "shf.l.wrap.b32", u32, u32, u32, u32, \
      (u32)(((((u64)b << 32) | a) << (c & 31)) >> 32)) \
    X(shf_r_wrap, "shf.r.wrap.b32", u32, u32, u32, u32, \
      (u32)((((u64)b << 32) | a) >> (c & 31)))

#define COMPARE(X) \
    X(eq_b32, "setp.eq.b32", u32, ==) X(ne_b32, "setp.ne.b32", u32, !=) \
    X(eq_s32, "setp.eq.s32", u32, ==) X(ne_s32, "setp.ne.s32", u32, !=) \
    X(lt_s32, "setp.lt.s32", s32, <) X(le_s32, "setp.le.s32", s32, <=) \
    X(gt_s32, "setp.gt.s32", s32, >) X(ge_s32, "setp.ge.s32", s32, >=) \
    X(lt_u32, "setp.lt.u32", u32, <) X(le_u32, "setp.le.u32", u32, <=) \
    X(gt_u32, "setp.gt.u32", u32, >) X(ge_u32, "setp.ge.u32", u32, >=) \
    X(eq_b16, "setp.eq.b16", u32, ==) X(ne_b16, "setp.ne.b16", u32, !=) \
    X(lt_u16, "setp.lt.u16", u32, <) X(gt_u16, "setp.gt.u16", u32, >) \
    X(ge_u16, "setp.ge.u16", u32, >=) X(le_u16, "setp.le.u16", u32, <=) \
    X(eq_f32, "setp.eq.f32", f32, ==) X(neu_f32, "setp.neu.f32", f32, !=) \
    X(lt_f32, "setp.lt.f32", f32, <) X(le_f32, "setp.le.f32", f32, <=) \
    X(gt_f32, "setp.gt.f32", f32, >) X(ge_f32, "setp.ge.f32", f32, >=) \
    X(eq_b64, "setp.eq.b64", u64, ==) X(ne_b64, "setp.ne.b64", u64, !=) \
    X(eq_s64, "setp.eq.s64", u64, ==) X(ne_s64, "setp.ne.s64", u64, !=) \
    X(eq_u32, "setp.eq.u32", u32, ==) X(ne_u32, "setp.ne.u32", u32, !=) \
    X(lt_s64, "setp.lt.s64", s64, <) X(ge_s64, "setp.ge.s64", s64, >=) \
    X(gt_s64, "setp.gt.s64", s64, >) X(le_s64, "setp.le.s64", s64, <=) \
    X(lt_u64, "setp.lt.u64", u64, <) X(ge_u64, "setp.ge.u64", u64, >=) \
    X(gt_u64, "setp.gt.u64", u64, >) X(le_u64, "setp.le.u64", u64, <=)

/* X(name, PTX): run.c has a case of its own for each */
#define OTHERS(X) \
    X(selp32, "selp.b32") X(selp64, "selp.b64") X(bfi_b32, "bfi.b32") \
    X(and_pred, "and.pred") X(or_pred, "or.pred") X(xor_pred, "xor.pred") \
    X(not_pred, "not.pred") X(mov_pred, "mov.pred") \
    X(cvt_bf16x2, "cvt.rn.bf16x2.f32") X(cvt_f16x2, "cvt.rn.f16x2.f32") \
    X(pack16, "pack16") X(unpack16, "unpack16") X(pack32, "pack32") X(unpack32, "unpack32") \
    X(ld_param, "ld.param") X(ctaid, "ctaid") X(tid, "tid") X(nctaid, "nctaid") \
    X(ld_global, "ld.global") X(st_global, "st.global") \
    X(ld_shared, "ld.shared") X(st_shared, "st.shared") \
    X(cp_async, "cp.async") X(bra, "bra") X(blend, "blend")

/* Likewise, of all lanes of a warp together: what they wait for or bring about is kept of a warp */
#define TOGETHER(X) \
    X(ret, "ret") X(bar_sync, "bar.sync") X(warp_sync, "bar.warp.sync") \
    X(ldmatrix, "ldmatrix") X(stmatrix, "stmatrix") \
    X(cp_commit, "cp.async.commit_group") X(cp_wait, "cp.async.wait_group") \
    X(shfl_idx, "shfl.sync.idx.b32") X(shfl_bfly, "shfl.sync.bfly.b32") \
    X(mma_bf16, "mma.bf16") X(mma_f16, "mma.f16") X(mma_tf32, "mma.tf32") \
    X(mma_bf16_k8, "mma.bf16.k8") X(mma_f16_k8, "mma.f16.k8") \
    X(mma_f64_884, "mma.f64.884") X(mma_f64_16816, "mma.f64.16816") \
    X(wgmma, "wgmma") X(wgmma_fence, "wgmma.fence") X(wgmma_commit, "wgmma.commit_group") \
    X(wgmma_wait, "wgmma.wait_group") X(fence_async, "fence.proxy.async")
