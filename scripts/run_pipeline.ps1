# Make a trained model and a GGUF file from text. This script does the same as run_pipeline.sh, with the same flags:
#   ./scripts/run_pipeline.ps1 --demo
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'
. (Join-Path $PSScriptRoot 'venv.ps1')

$root = Split-Path -Parent $PSScriptRoot
# Look for a text first, since the installation takes minutes.
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
    Pop-Location # so that relative paths start at the caller's folder
}
& $python -m atlas pipeline @words
exit $LASTEXITCODE
