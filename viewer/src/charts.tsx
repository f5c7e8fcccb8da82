// Charts as SVG, from numbers: what the experiments measured, and the spectrum of a class.

import type { Evidence, Spectrum } from "./api";
import { useMedia } from "./state";

const NEEDED = ["cut:colour", "cut:exchange", "paste:same place", "paste:same rule", "undo", "apply"];

/** Changes of the class's score by each test: the treatment with the interval of its effect, and the control.
 *
 * On a narrow screen the names stand above their lines, so that they can be read. */
export function EvidenceChart({ evidence }: { evidence: Evidence[] }) {
  const narrow = useMedia("(max-width: 520px)");
  const ends = evidence.flatMap((one) => [one.treated, one.control, one.control + one.interval[0], one.control + one.interval[1]]);
  const low = Math.min(0, ...ends);
  const high = Math.max(0, ...ends);
  const span = high - low || 1;
  const [width, left, step] = narrow ? [360, 16, 40] : [640, 170, 26];
  const x = (value: number) => left + ((width - left - 30) * (value - low)) / span;
  const height = step * evidence.length + 30;
  const ticks = [low, 0, high].filter((one, i) => i !== 1 || (x(0) - x(low) > 40 && x(high) - x(0) > 40));
  return (
    <svg class="effects" viewBox={`0 0 ${width} ${height}`} role="img" aria-label={describe(evidence)}>
      <line class="axis" x1={x(0)} x2={x(0)} y1={4} y2={height - 24} />
      {evidence.map((one, i) => (
        <g transform={`translate(0 ${step * (i + 1) - 10})`}>
          <title>{`${one.test}: effect ${signed(one.effect)} (${signed(one.interval[0])} to ${signed(one.interval[1])}), p = ${one.p.toPrecision(2)}, n = ${one.n}`}</title>
          <text
            x={narrow ? 0 : left - 10}
            y={narrow ? -13 : 4}
            text-anchor={narrow ? "start" : "end"}
            class={NEEDED.includes(one.test) ? "needed" : ""}
          >
            {one.test}
          </text>
          <line class="interval" x1={x(one.control + one.interval[0])} x2={x(one.control + one.interval[1])} y1={0} y2={0} />
          <circle class="control" cx={x(one.control)} cy={0} r={4.5} />
          <circle class="treated" cx={x(one.treated)} cy={0} r={4.5} />
        </g>
      ))}
      {[...new Set(ticks)].map((value) => (
        <text x={x(value)} y={height - 6} text-anchor="middle">
          {value === 0 ? "0" : signed(value)}
        </text>
      ))}
    </svg>
  );
}

export function signed(value: number): string {
  return `${value > 0 ? "+" : ""}${value.toFixed(2)}`;
}

function describe(evidence: Evidence[]): string {
  const told = evidence.map((one) => `${one.test}: ${signed(one.treated)}, control ${signed(one.control)}`);
  return `Change of the class's score. ${told.join("; ")}`;
}

export function SpectrumChart({ spectrum }: { spectrum: Spectrum }) {
  const values = (spectrum.eigenvalues ?? []).slice(0, 12);
  if (!values.length) return <p class="soft">This class was too small to be analysed.</p>;
  const most = Math.max(...values, 1e-9);
  const clusters = spectrum.clusters ?? 1;
  const label = `Eigenvalues of the neighbour graph; the gap speaks for ${clusters} cluster${clusters === 1 ? "" : "s"}`;
  return (
    <svg class="spectrum" viewBox="0 0 300 118" role="img" aria-label={label}>
      <line class="axis" x1={28} x2={296} y1={100} y2={100} />
      {values.map((value, i) => {
        const height = Math.max(1.5, (90 * value) / most);
        return (
          <>
            <rect class={i < clusters ? "bar chosen" : "bar"} x={30 + 22 * i} y={100 - height} width={15} height={height} rx={2}>
              <title>{`λ${i + 1} = ${value.toFixed(4)}`}</title>
            </rect>
            <text x={37.5 + 22 * i} y={113} text-anchor="middle">
              {i + 1}
            </text>
          </>
        );
      })}
      <text x={26} y={14} text-anchor="end">
        {most.toFixed(2)}
      </text>
      <text x={26} y={103} text-anchor="end">
        0
      </text>
    </svg>
  );
}
