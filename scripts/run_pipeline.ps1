# From text to a trained model and a GGUF file; the twin of run_pipeline.sh, with the same flags:
#   ./scripts/run_pipeline.ps1 --demo
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'
. (Join-Path $PSScriptRoot 'venv.ps1')

$root = Split-Path -Parent $PSScriptRoot
# Check for a text before minutes of installing.
$env:PYTHONUTF8 = '1'
[Console]::OutputEncoding = [System.Text.Encoding]::UTF8
$words = @($args)
$chosen = & (Find-Python) (Join-Path $root 'atlas/cli/choose_text.py') './scripts/run_pipeline.ps1' @words
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
if ($chosen) { $words += $chosen }

Push-Location $root
try {
    $python = Initialize-Venv -Extras 'llama,serve' -UseActive
}
finally {
    Pop-Location # relative paths are relative to the caller's folder
}
& $python -m atlas pipeline @words
exit $LASTEXITCODE
