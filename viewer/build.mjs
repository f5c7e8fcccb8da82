// Builds the page into src/pfungst/viewer/static.  The digest of all sources stands in the script's first line, so that
// a test can tell without npm whether what was built is of these sources.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { copyFileSync, readFileSync, readdirSync } from "node:fs";

const out = "../src/pfungst/viewer/static";
const sources = ["package-lock.json", "tsconfig.json", "build.mjs", ...readdirSync("src").map((name) => `src/${name}`)];
const digest = createHash("sha256");
for (const name of sources.sort()) digest.update(name).update("\0").update(readFileSync(name)).update("\0");

await build({
  entryPoints: { app: "src/main.tsx" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "inline",
  banner: { js: `/* sources: ${digest.digest("hex")} */` },
});
await build({ entryPoints: ["src/app.css"], outdir: out, minify: true });
for (const name of ["index.html", "icon.svg"]) copyFileSync(`src/${name}`, `${out}/${name}`);
copyFileSync("node_modules/preact/LICENSE", `${out}/preact.LICENSE.txt`); // what its licence asks for
