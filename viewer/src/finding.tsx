// The page of one finding: pictures of members beside others, evidence, and what a person needs to decide.

import { useEffect, useState } from "preact/hooks";
import { ANSWERS, findingUrl, get, lastAnswer, post, type Answer, type Finding, type Judgement, type Listed } from "./api";
import { ModeButtons, Pager, PaletteChoice, readLook } from "./look";
import { Picture, scaleOf, useMaps, usePalettes, WHOLE, type Look } from "./pictures";
import { go, type State } from "./state";

const AT_ONCE = 12;
const ROLES: Record<string, string> = {
  members: "Members",
  central: "At the centre",
  rim: "At the rim",
  nearest: "Nearest that are no members",
};

export function FindingPage(props: {
  run: number;
  listed: Listed;
  state: State;
  onAnswer: (what: Answer) => void;
  onNote: () => void;
  onUndo: () => void;
}) {
  const { run, listed } = props;
  const [finding, setFinding] = useState<Finding>();
  const [failure, setFailure] = useState("");
  useEffect(() => {
    get<Finding>(`runs/${run}/findings/${listed.id}`).then(setFinding, (error: Error) => setFailure(error.message));
  }, [run, listed.id]);
  const answer = lastAnswer(listed);
  return (
    <article>
      <button type="button" class="plain back" onClick={() => go({ finding: "" })}>
        ← all findings
      </button>
      <h2>
        {listed.id}: {listed.class}, {listed.where.place}
      </h2>
      <p class="line">
        <span class={`chip ${listed.verdict}`}>{listed.verdict}</span>
        {answer && <span class="chip judged">judged: {answer}</span>}
        <span class="soft small">{listed.head}</span>
      </p>
      <p class="summary">{listed.summary}</p>
      {listed.rule && <p class="soft">{listed.rule}</p>}
      <div class="line judging" role="group" aria-label="Your judgement">
        {ANSWERS.map((what) => (
          <button type="button" aria-pressed={answer === what} onClick={() => props.onAnswer(what)}>
            {what} <kbd>{what[0]}</kbd>
          </button>
        ))}
        <button type="button" onClick={props.onNote}>
          note <kbd>n</kbd>
        </button>
        <button type="button" onClick={props.onUndo}>
          undo <kbd>z</kbd>
        </button>
        <button type="button" onClick={() => go({ view: "try", finding: listed.id, values: { row: "" } })}>
          try it
        </button>
        <button
          type="button"
          disabled={!finding}
          onClick={() => void showOnMap(run, listed.class_index, finding?.rows ?? [])}
        >
          on the map
        </button>
      </div>
      <Said judgements={listed.judgements} />
      {failure && <p class="failure">{failure}</p>}
      {finding && (
        <>
          <Samples run={run} finding={finding} state={props.state} />
          <Proof {...finding} picture={(name) => findingUrl(run, finding.id, name)} />
          <Facts run={run} finding={finding} />
        </>
      )}
    </article>
  );
}

/** What people said, the latest first. */
export function Said({ judgements }: { judgements: Judgement[] }) {
  if (!judgements.length) return null;
  return (
    <ul class="said">
      {[...judgements].reverse().map((one) => (
        <li>
          <b>{one.answer}</b>, says {one.by} ({one.at}){one.about && <span class="open"> {one.about}</span>}
          {one.note && `: ${one.note}`}
        </li>
      ))}
    </ul>
  );
}

/** The map of the class with the members selected: a sample is coloured by one finding only, but may be in several. */
async function showOnMap(run: number, index: number, rows: number[]): Promise<void> {
  const kept = (await (await post(`runs/${run}/selections`, { rows })).json()) as { id: string };
  go({ view: "map", values: { layout: `tsne:${index}`, colour: "finding", only: "", at: "", chosen: kept.id } });
}

/** Members and those that are none, side by side: one look, one zoom and one scale for both. */
function Samples({ run, finding, state }: { run: number; finding: Finding; state: State }) {
  const [zoom, setZoom] = useState(WHOLE);
  const { opacity = "90", scale = "same", left = "members", right = "nearest" } = state.values;
  const wanted = readLook(state, "overlay");
  const page = Number(state.values["page"]) || 0;
  const first = AT_ONCE * page;
  const rowsOf = (role: string): number[] => {
    if (role === "central" || role === "rim" || role === "nearest") return finding[role];
    return finding.rows.slice(first, first + AT_ONCE);
  };
  const sides = [rowsOf(left), rowsOf(right)];
  const maps = useMaps(run, sides.flat(), wanted.mode !== "input");
  const most = scaleOf(maps);
  const set = (name: string, value: string) => go({ values: { [name]: value } }, true);
  return (
    <section aria-label="Pictures">
      <div class="line tools">
        <ModeButtons mode={wanted.mode} />
        <label>
          Opacity
          <input
            type="range"
            min="0"
            max="100"
            value={opacity}
            disabled={wanted.mode !== "overlay"}
            onInput={(event) => set("opacity", event.currentTarget.value)}
          />
        </label>
        <PaletteChoice palette={wanted.palette} />
        <label>
          Scale
          <select value={scale} onChange={(event) => set("scale", event.currentTarget.value)}>
            <option value="same">one for all</option>
            <option value="own">each its own</option>
          </select>
        </label>
        {zoom.factor > 1 && (
          <button type="button" onClick={() => setZoom(WHOLE)}>
            whole pictures
          </button>
        )}
      </div>
      {wanted.mode !== "input" && (
        <Legend look={wanted} most={most} />
      )}
      <div class="sides">
        {sides.map((rows, side) => (
          <div>
            <h3>
              <select
                aria-label={side ? "Right side" : "Left side"}
                value={side ? right : left}
                onChange={(event) => set(side ? "right" : "left", event.currentTarget.value)}
              >
                {Object.entries(ROLES).map(([role, title]) => (
                  <option value={role}>{title}</option>
                ))}
              </select>
            </h3>
            <div class="pictures">
              {rows.map((row, i) => (
                <Picture
                  key={row}
                  run={run}
                  row={row}
                  look={wanted}
                  map={maps[side * sides[0]!.length + i]}
                  scale={most}
                  zoom={zoom}
                  onZoom={setZoom}
                  label={`sample ${row}, ${side ? ROLES[right] : ROLES[left]}`}
                />
              ))}
            </div>
            {(side ? right : left) === "members" && (
              <Pager name="page" page={page} each={AT_ONCE} count={finding.rows.length} of />
            )}
          </div>
        ))}
      </div>
      <p class="soft small">
        Double-click, or turn the wheel with Ctrl, to zoom all pictures alike. Members come in the order of the data;
        maps are those of the run, on the part of the picture that the model gets.
      </p>
    </section>
  );
}

function Legend({ look, most }: { look: Look; most: number }) {
  const known = usePalettes();
  const table = known?.palettes[look.palette];
  if (!known || !table) return null;
  const oneSided = known.one_sided.includes(look.palette);
  const stops = [0, 0.25, 0.5, 0.75, 1].map((share) => `rgb(${table[Math.round(share * (table.length - 1))]!.join()})`);
  const end = look.same ? most.toPrecision(2) : "the greatest of each picture";
  return (
    <p class="line legend small">
      <span>{oneSided ? "0" : `against (${look.same ? `−${end}` : "−"})`}</span>
      <span class="ramp" style={{ backgroundImage: `linear-gradient(90deg, ${stops.join()})` }} />
      <span>for the class ({look.same ? `+${end}` : "+"})</span>
      <span class="soft">{look.same ? "one scale for all pictures" : "each picture has a scale of its own"}</span>
    </p>
  );
}

/** A chart as the server drew it: SVG, in which all that is not its own is escaped (src/pfungst/charts.py). */
export function Chart({ text }: { text: string }) {
  return <div dangerouslySetInnerHTML={{ __html: text }} />;
}

export function signed(value: number): string {
  return `${value > 0 ? "+" : ""}${value.toFixed(2)}`;
}

/** What the experiments measured.  `picture`: the address of a picture of the experiment. */
export function Proof(
  finding: Pick<Finding, "evidence" | "chart" | "experiment" | "again"> & { picture: (name: string) => string },
) {
  return (
    <section aria-label="Evidence">
      <h3>Evidence</h3>
      <Chart text={finding.chart} />
      {finding.experiment.length > 0 && (
        <div class="pictures steps">
          {finding.experiment.map((one) => (
            <figure>
              <img src={finding.picture(one.name)} alt={one.title} loading="lazy" />
              <figcaption>{one.caption}</figcaption>
            </figure>
          ))}
        </div>
      )}
      <details>
        <summary>All numbers</summary>
        <div class="scroll">
          <table>
            <thead>
              <tr>
                {["test", "n", "treated", "control", "effect", "95 %", "p", "probability", "flips", "control's"].map((name) => (
                  <th scope="col">{name}</th>
                ))}
              </tr>
            </thead>
            <tbody>
              {finding.evidence.map((one) => (
                <tr>
                  <th scope="row">{one.test}</th>
                  <td>{one.n}</td>
                  <td>{signed(one.treated)}</td>
                  <td>{signed(one.control)}</td>
                  <td>{signed(one.effect)}</td>
                  <td>
                    {signed(one.interval[0])} … {signed(one.interval[1])}
                  </td>
                  <td>{one.p.toPrecision(2)}</td>
                  <td>{signed(one.probability)}</td>
                  <td>{(100 * one.flips).toFixed(0)} %</td>
                  <td>{(100 * one.control_flips).toFixed(0)} %</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
        <p class="soft small">Flips: decisions that leave the class (cut, undo, borders) or turn to it (paste, apply).</p>
      </details>
      {finding.again.map((one) => (
        <p>
          Tested again, seed {one.seed}: <b class={one.verdict}>{one.verdict}</b>
          {one.lines.map((line) => (
            <span class="said-again small">{line}</span>
          ))}
        </p>
      ))}
    </section>
  );
}

/** The pictures of a finding that are no sample's. */
export function Drawn({ run, finding }: { run: number; finding: Finding }) {
  return (
    <>
      {finding.drawn.map((one) => (
        <figure>
          <img class={one.name === "mask" ? "region" : ""} src={findingUrl(run, finding.id, one.name)} alt={one.title} loading="lazy" />
          <figcaption>{one.title}</figcaption>
        </figure>
      ))}
    </>
  );
}

function Facts({ run, finding }: { run: number; finding: Finding }) {
  return (
    <section class="facts">
      <div>
        <h3>What the group is like</h3>
        <dl>
          {finding.facts.map((fact) => (
            <>
              <dt>{fact.name}</dt>
              {fact.lines.map((line) => (
                <dd>{line}</dd>
              ))}
            </>
          ))}
        </dl>
      </div>
      <div>
        <h3>Where</h3>
        <div class="pictures three">
          <Drawn run={run} finding={finding} />
        </div>
        <h3>Spectrum of the class</h3>
        <Chart text={finding.spectrum.chart} />
        <p class="soft small">{finding.spectrum.text}</p>
      </div>
    </section>
  );
}
