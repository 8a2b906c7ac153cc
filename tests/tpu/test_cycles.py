"""The cycles of a program, from excerpts of what the TPU's compiler writes. Needs neither libtpu nor a TPU."""

from pathlib import Path

import pytest

from benchmarks.tpu.bundles import OVERHEAD, parse
from benchmarks.tpu.cycles import CHIPS, costs, read_schedules, transferred
from benchmarks.tpu.program import Program

# a loop of 7 trips whose first and last two only fill and drain it, around one whose length is not in the code
CODE = """\
LB: loop body
= control target key end

     0   :  { %s12_s3 = smov 0 /* copy for cssa */ } /* entry bundle: %fusion.1 = fusion() */
   0x1 LB: > { %s1_s9 = sadd.s32 4294967294, %s11_s8 /* iteration index, stage = 2 */  ;;  %s2_s8 = sphi %s9_s8, %s10_s8 /* phi copy :: iteration index, stage = 0 */ }
   0x2   : > { %205 = sbr.rel (%p202_p4) target = $region42 }
   0x3   :  {}
   0x4   : > { %1 = vmatpush.bf16.msra.mxu0 %v1  ;;  %2 = vmatmul.bf16.gmra.mxu0 %v2  ;;  %3 = vmatmul.f32.gmra.mxu1 %v3
window_bounds: (6, 28, 8, 1) */ }
   0x5   : > { %4 = vmatmul.lmr.bf16.gmra.16.mxu1 %v2  ;;  %5 = vmatmul.lmr.bf16.gmra.3.mxu1 %v3  ;;  %6 = vmatpush.msk.msra.mxu1 %v4 }
   0x6 LB: >> { %s4_s9 = sadd.s32 1, %s5_s5 }
   0x7   : >> { %s6_s9 = sadd.s32 1, %s5_s5 }
   0x8 PF: > { %p4_p5 = scmp.ge.s32.totalorder %s7_s8, 7 /* loop exit test */  ;;  %s14_s7 = smov %s14_s10 }
   0x9   :  { %6 = sbr.rel (!%p4_p5) target = $region24 }
"""  # noqa: E501

HLO = """\
HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.1: bf16[128,14,14,24], param_1.1: bf16[3,24]) -> bf16[128,14,14,24] {
  %param_0.1 = bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[3,24]{1,0:T(4,128)(2,1)S(1)} parameter(1)
  ROOT %multiply.1 = bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)} multiply(%param_0.1, %param_0.1)
}

%fused_computation.2 (param_0.2: f32[64,200], param_1.2: f32[1,200], param_2.2: s32[]) -> f32[64,200] {
  %param_0.2 = f32[64,200]{1,0:T(8,128)} parameter(0)
  %param_1.2 = f32[1,200]{1,0:T(1,128)} parameter(1)
  %param_2.2 = s32[]{:T(128)S(6)} parameter(2)
  ROOT %dynamic-update-slice.2 = f32[64,200]{1,0:T(8,128)} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2)
}

ENTRY %main.9 (x.1: bf16[128,14,14,24], w.1: bf16[3,24], buffer.1: f32[64,200], row.1: f32[1,200], at.1: s32[]) -> (bf16[128,14,14,24], f32[64,200]) {
  %x.1 = bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %w.1 = bf16[3,24]{1,0:T(4,128)(2,1)} parameter(1)
  %buffer.1 = f32[64,200]{1,0:T(8,128)} parameter(2)
  %row.1 = f32[1,200]{1,0:T(1,128)} parameter(3)
  %at.1 = s32[]{:T(128)S(6)} parameter(4)
  %copy-start.1 = (bf16[3,24]{1,0:T(4,128)(2,1)S(1)}, bf16[3,24]{1,0:T(4,128)(2,1)}, u32[]{:S(2)}) copy-start(%w.1)
  %copy-done.1 = bf16[3,24]{1,0:T(4,128)(2,1)S(1)} copy-done(%copy-start.1)
  %fusion.1 = bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)} fusion(%x.1, %copy-done.1), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(f)/mul" stack_frame_id=3}, backend_config={"window_config":{"kernel_window_bounds":["1"]},"estimated_cycles":"123"}
  %all-reduce-start.1 = bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)} all-reduce-start(%fusion.1), to_apply=%add
  %all-reduce-done.1 = bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)} all-reduce-done(%all-reduce-start.1)
  %fusion.7 = bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)} fusion(%all-reduce-done.1, %copy-done.1), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(f)/again" stack_frame_id=4}, backend_config={"window_config":{"kernel_window_bounds":["1"]},"estimated_cycles":"124"}
  %fusion.2 = f32[64,200]{1,0:T(8,128)} fusion(%buffer.1, %row.1, %at.1), kind=kLoop, calls=%fused_computation.2
  ROOT %tuple.1 = (bf16[128,14,14,24]{0,3,2,1:T(8,128)(2,1)}, f32[64,200]{1,0:T(8,128)}) tuple(%fusion.7, %fusion.2)
}
"""  # noqa: E501

SUMS = """\
%region_1.3 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

%region_2.4 (a.2: f32[], b.2: f32[]) -> f32[] {
  %a.2 = f32[]{:T(128)} parameter(0)
  %b.2 = f32[]{:T(128)} parameter(1)
  ROOT %add.2 = f32[]{:T(128)} add(%a.2, %b.2)
}

ENTRY %main.9 (x.1: f32[512], y.1: f32[512], zero.1: f32[]) -> f32[] {
  %x.1 = f32[512]{0:T(512)} parameter(0)
  %y.1 = f32[512]{0:T(512)} parameter(1)
  %zero.1 = f32[]{:T(128)} parameter(2)
  %reduce.1 = f32[]{:T(128)} reduce(%x.1, %zero.1), dimensions={0}, to_apply=%region_1.3, metadata={op_name="sum"}
  %reduce.2 = f32[]{:T(128)} reduce(%y.1, %zero.1), dimensions={0}, to_apply=%region_2.4
  ROOT %add.3 = f32[]{:T(128)} add(%reduce.1, %reduce.2)
}
"""

MAP = 14 * 14 * 24 * 128 * 2
ROW = 256 * 4


def test_a_loop_takes_its_bundles_or_its_busiest_matrix_unit() -> None:
    code = parse(CODE)
    (loop,) = code.inner
    assert (code.bundles, loop.bundles, loop.trips, loop.stages, [inner.trips for inner in loop.inner]) == (
        3, 5, 7, 2, [None]
    )  # fmt: skip
    assert loop.products == {"0": 16, "1": 8 + 8 + 16} and loop.pushes == {"0": 4, "1": 2}
    assert code.cycles() == 3 + (7 - 2) * (32 * OVERHEAD + 2)
    assert code.cycles(matrix_speed=8) == 3 + (7 - 2) * (5 + 2), "then the bundles are more"
    assert code.unknown() == 1
    with pytest.raises(ValueError, match="no bundles"):
        parse("LB: loop body\n")


def test_bytes_are_those_of_whole_tiles_and_of_what_is_sliced() -> None:
    program = Program.parse(HLO)
    by_name = {operation.name: operation for operation in program.operations}
    assert program.bytes(by_name["fusion.1"]) == 2 * MAP, "read once and written, and the other operand is in VMEM"
    assert program.bytes(by_name["fusion.2"]) == 2 * ROW, "a row of 200 padded to 256, into a buffer that stays"
    assert by_name["w.1"].outputs[0].bytes == 4 * 128 * 2
    assert transferred(program) == 4 * 128 * 2
    assert program.collectives() == {"all-reduce": 1}


def test_equal_operations_share_one_schedule_and_none_may_lack_one(tmp_path: Path) -> None:
    # without its collective, whose code the excerpt does not have
    text = HLO.replace("all-reduce-start.1 = ", "bitcast.1 = ").replace(" all-reduce-start(", " bitcast(")
    text = text.replace("all-reduce-done(%all-reduce-start.1)", "bitcast(%bitcast.1)")
    program, chip = Program.parse(text), CHIPS["v5e"]
    (tmp_path / "1795871269438717744-fusion.1-01-final_bundles.txt").write_text(CODE)
    (tmp_path / "1795871269438717744-fusion.1-00-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    schedules = read_schedules(tmp_path)
    assert schedules.keys() == {"fusion.1"}
    with pytest.raises(ValueError, match=r"1 of 3 operations have no schedule, among them fusion.2 \(fusion\)"):
        costs(program, schedules, chip)
    (tmp_path / "1795871269438717745-fusion.2-02-final_bundles.txt").write_text(CODE)
    first, again, update = costs(program, read_schedules(tmp_path), chip)
    assert first.cycles == again.cycles == pytest.approx(2 * MAP / 819e9 * 1.5e9), "bound by memory"
    assert update.cycles == update.compute == parse(CODE).cycles(), "bound by arithmetic"


def test_reductions_by_equal_functions_are_equal_and_sums_of_single_numbers_are_free() -> None:
    schedules, chip = {"reduce.1": parse(CODE)}, CHIPS["v5e"]
    assert [cost.operation.name for cost in costs(Program.parse(SUMS), schedules, chip)] == ["reduce.1", "reduce.2"]
    other = SUMS.replace("f32[]{:T(128)} add(%a.2", "f32[]{:T(128)} maximum(%a.2")
    with pytest.raises(ValueError, match=r"1 of 2 operations have no schedule, among them reduce.2 \(reduce\)"):
        costs(Program.parse(other), schedules, chip)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        Program.parse("HloModule empty\n")
