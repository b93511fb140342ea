"""Following a thread through machine code, and the model of when it issues: by hand-made code with known answers."""

import pytest

pytest.importorskip("triton")
import issue_model
import sass_listing
import traced_kernels
from issue_model import CALIBRATION, Scheduler, Setting
from sass_listing import Instruction
from sass_machine import Thread, one_row

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000e020000000800 */
        /*0010*/              @!P0 FFMA R4, R5.reuse, -R6, c[0x0][0x210] ;     /* 0x0000840005047a23 */
                                                                              /* 0x009fc80000000806 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ; /* 0x01e0000804187df0 */
                                                                              /* 0x000fe20008041818 */
        /*0030*/              @P1 BRA 0x10 ;                                   /* 0xfffffffc00f01947 */
                                                                              /* 0x003fea000383ffff */
"""


def code(*lines):
    """Return instructions of lines such as "@!P0 IADD3 R1, R1, 0x1, RZ", 16 bytes each."""
    found = []
    for i, line in enumerate(lines):
        predicate = ""
        if line.startswith("@"):
            predicate, line = line[1:].split(" ", 1)
        name, _, operands = line.partition(" ")
        split = tuple(part.strip() for part in operands.split(",")) if operands else ()
        found.append(Instruction(16 * i, predicate, name, split))
    return found


def names(trace):
    return " ".join(instruction.base for instruction in trace)


def test_a_listing_has_predicates_operands_and_control_bits():
    load, multiply, product, branch = sass_listing.parse(LISTING)
    assert load == Instruction(0, "", "LDC", ("R1", "c[0x0][0x28]"), stall=1, sets=0, reads=7, waits=0)
    assert (multiply.predicate, multiply.base, multiply.operands[2]) == ("!P0", "FFMA", "-R6")
    assert (multiply.stall, multiply.sets, multiply.reads, multiply.waits) == (4, 7, 7, 0b1001)
    assert issue_model.columns_of(product) == 128
    assert (branch.predicate, branch.target, branch.waits) == ("P1", 0x10, 0b11)


def test_a_loop_turns_as_often_as_a_parameter_says():
    body = code(
        "MOV R2, RZ",
        "IADD3 R2, R2, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R2, c[0x0][0x210], PT",
        "@!P0 BRA 0x10",
        "EXIT",
    )
    trace = list(Thread(body, {0: bytes(0x210) + (5).to_bytes(4, "little")}).run())
    assert names(trace).count("IADD3") == 5


def test_an_indirect_branch_takes_its_target_from_a_table():
    body = code("LDC R2, c[0x0][0x0]", "SHF.L.U32 R3, R2, 0x2, RZ", "LDC R4, c[0x2][R3+0x4]", "BRX R4 -0x40")
    body += code("FADD R9, R9, R9", "EXIT", "FMUL R9, R9, R9", "EXIT")
    body = [instruction._replace(address=16 * i) for i, instruction in enumerate(body)]
    table = b"".join(address.to_bytes(4, "little") for address in (0, 0x40, 0x60))
    for opcode, reached in ((0, "FADD"), (1, "FMUL")):
        trace = list(Thread(body, {0: opcode.to_bytes(4, "little"), 2: table}).run())
        assert trace[-2].base == reached


@pytest.mark.parametrize(
    ("line", "register", "value"),
    [
        ("IMAD R5, R1, 0x3, R2", "R5", 37),
        ("IADD3 R5, -R2, R1, RZ", "R5", 3),
        ("LOP3.LUT R5, R1, 0xc, RZ, 0xc0, !PT", "R5", 0b1000),
        ("LOP3.LUT R5, R1, R2, RZ, 0x3c, !PT", "R5", 10 ^ 7),
        ("SHF.R.U32.HI R5, RZ, 0x1, R1", "R5", 5),
        ("SHF.R.S32.HI R5, RZ, 0x1f, R3", "R5", 0xFFFFFFFF),
        ("LEA R5, R1, R2, 0x3", "R5", 87),
        ("SEL R5, R1, R2, !PT", "R5", 7),
        ("VIMNMX R5, R1, R3, PT", "R5", 0xFFFFFFFC),
        ("VIMNMX.U32 R5, R1, R3, PT", "R5", 10),
        ("VIADDMNMX R5, R1, R2, 0xc, PT", "R5", 12),
        ("ISETP.LT.AND P2, PT, R3, R1, PT", "P2", True),
        ("ISETP.LT.U32.AND P2, PT, R3, R1, PT", "P2", False),
        ("UISETP.NE.AND UP2, UPT, UR4, URZ, UPT", "UP2", True),
        ("PLOP3.LUT P2, PT, PT, PT, UP1, 0x80, 0x0", "P2", True),
        ("SHFL.IDX PT, R5, R1, RZ, 0x1f", "R5", 10),
        ("SHFL.BFLY PT, R5, R1, 0x1, 0x1f", "R5", None),
        ("LDS.128 R4, [R1]", "R5", None),
        ("HGMMA.64x16x16.F32.BF16 R0, R4, gdesc[UR8], R0", "R5", None),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R1", "P2", True),
        ("@P3 MOV R5, R1", "R5", None),
        ("@!PT MOV R5, R1", "R5", 99),
    ],
)
def test_what_an_instruction_leaves(line, register, value):
    known = {"R1": 10, "R2": 7, "R3": -4 & 0xFFFFFFFF, "R5": 99, "UR4": 1, "UP1": True}
    thread = Thread(code(line, "EXIT"), {}, known=dict(known))
    list(thread.run())
    assert thread.known.get(register) == value


def test_registers_come_back_from_the_stack():
    body = code("MOV R2, 0x7", "STL [R1+0x8], R2", "MOV R2, RZ", "LDL R3, [R1+0x8]", "EXIT")
    thread = Thread(body, {}, known={"R1": 0})
    list(thread.run())
    assert thread.known["R3"] == 7


def test_a_branch_on_something_unknown_is_not_taken_and_told():
    thread = Thread(code("LDG.E R2, [R4]", "ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 BRA 0x0", "EXIT"), {})
    assert names(thread.run()) == "LDG ISETP BRA EXIT"
    assert dict(thread.undecided) == {0x20: 1}


ROWS = code(
    "MOV R2, RZ",
    "MOV R3, RZ",  # a row
    "IADD3 R3, R3, 0x1, RZ",  # a layer
    "ISETP.NE.AND P0, PT, R3, 0x3, PT",
    "@P0 BRA 0x20",
    "IADD3 R2, R2, 0x1, RZ",
    "ISETP.NE.AND P0, PT, R2, 0x5, PT",
    "@P0 BRA 0x10",
    "EXIT",
)


def test_a_row_is_one_turn_of_the_loop_over_rows():
    row = one_row(Thread(ROWS, {}), 5)
    assert names(row) == "MOV " + "IADD3 ISETP BRA " * 3 + "IADD3 ISETP BRA"
    with pytest.raises(RuntimeError, match="no instruction is passed 7 times"):
        one_row(Thread(ROWS, {}), 7)


def repeated(count, name, **fields):
    return [Instruction(16 * i, "", name, (), **fields) for i in range(count)]


@pytest.mark.parametrize(
    ("trace", "setting", "cycles"),
    [
        # A chain of sums waits four cycles for each; two warps fill each other's gaps; four sides leave none.
        (repeated(100, "FADD", stall=4), Setting(1), 400),
        (repeated(100, "FADD", stall=4), Setting(2), 400),
        (repeated(100, "FADD", stall=1), Setting(2), 200),
        # Special functions: one in eight cycles for all warps. Integers and selects: one in two.
        (repeated(100, "MUFU.LG2", stall=1), Setting(3), 2400),
        (repeated(100, "LOP3.LUT", stall=1), Setting(2), 400),
        # A load of 16 bytes a thread is four words of a path that four schedulers share.
        (repeated(100, "LDS.128", stall=1), Setting(2), 3200),
    ],
)
def test_pipes_and_stalls_bound_a_row(trace, setting, cycles):
    assert Scheduler(trace, setting).run() == pytest.approx(cycles, rel=0.05)


def test_matrix_products_take_half_a_cycle_a_column():
    product = Instruction(0, "", "HGMMA.64x128x16.F32.BF16", ("R24", "gsb0"), stall=1)
    wait = Instruction(16, "", "WARPGROUP.DEPBAR.LE", ("gsb0", "0x0"), stall=1)
    # Two warps: one's products hide the start and the end of the other's.
    assert Scheduler([product, wait] * 20, Setting(2)).run() == pytest.approx(2 * 20 * 64, rel=0.05)
    alone = Scheduler([product, wait] * 20, Setting(1)).run()
    assert alone == pytest.approx(20 * (64 + 2 * issue_model.TENSOR_START), rel=0.05)
    # A ring of two tiles lets nobody be further ahead than that, and each has to be refilled.
    assert Scheduler([product, wait] * 20, Setting(1, stages=2, refill=800)).run() > 20 * 400


def test_a_scoreboard_holds_what_waits_for_a_load():
    load = Instruction(0, "", "LDG.E", ("R2",), stall=1, sets=0)
    use = Instruction(16, "", "FADD", ("R3",), stall=1, waits=1)
    assert Scheduler([load, use], Setting(1)).run() == pytest.approx(issue_model.LATENCY["LDG"] + 1, rel=0.05)
    assert issue_model.cycles([load, use], Setting(1)) == CALIBRATION * Scheduler([load, use], Setting(1)).run()


def test_noise_between_branches_is_counted():
    noise, branch = repeated(8, "MUFU.SQRT"), repeated(1, "BRA")
    assert traced_kernels.side_by_side(noise + branch + repeated(3, "FADD") + branch + noise) == 8
    assert traced_kernels.side_by_side(noise + branch + noise[:1] + branch) == 1


ROW = {"network": "adaLN H=64 L=3", "kernel": "sm90_steps_kernel<64>", "width": 64, "instructions": 2600, "moves": 100}
ROW |= {"branches": 20, "indirect": 0, "special": 168, "tensor": 1024, "noise side by side": 32, "local": 0}
ROW |= {"undecided": 0, "shared": 227_776, "cycles": 3800}


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({}, ""),
        ({"instructions": 2640}, ""),
        ({"instructions": 2760}, "instructions 2600 -> 2760; 2760 instructions of 2750"),
        ({"moves": 250}, "moves 100 -> 250; 250 moves of 200"),
        ({"indirect": 2}, "indirect 0 -> 2; 2 indirect branches"),
        ({"special": 170}, "special 168 -> 170"),
        ({"tensor": 1088}, "tensor 1024 -> 1088"),
        ({"noise side by side": 1}, "noise side by side 32 -> 1; a branch after 1 elements of noise"),
        ({"local": 4}, "local 0 -> 4"),
        ({"shared": 232_449}, "232449 bytes of shared memory of 232448"),
        ({"cycles": 3900}, "cycles 3800 -> 3900"),
        ({"network": "adaLN H=65 L=3"}, "not recorded"),
    ],
)
def test_a_planted_change_of_a_trace_is_reported(change, reported):
    found = traced_kernels.exceeded([ROW | change], [ROW])
    assert "; ".join(line.split(": ", 1)[1] for line in found) == reported
